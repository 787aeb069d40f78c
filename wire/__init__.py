"""What two processes must agree on: messages, codec, sockets, KV layout, request types, errors."""
