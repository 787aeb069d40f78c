// Unpacks the browser, and the libraries that a bare machine lacks, into node_modules/browser.

import { chmodSync, createReadStream, createWriteStream, mkdirSync } from "node:fs";
import { execFileSync } from "node:child_process";
import { pipeline } from "node:stream/promises";
import { createBrotliDecompress } from "node:zlib";

const packed = "node_modules/@sparticuz/chromium/bin";
const target = "node_modules/browser";

async function unpack(from, to) {
  await pipeline(createReadStream(from), createBrotliDecompress(), createWriteStream(to));
}

mkdirSync(target, { recursive: true });
await unpack(`${packed}/chromium.br`, `${target}/chromium`);
chmodSync(`${target}/chromium`, 0o755);
for (const archive of ["al2023.tar", "swiftshader.tar"]) {
  await unpack(`${packed}/${archive}.br`, `${target}/${archive}`);
  execFileSync("tar", ["-xf", archive], { cwd: target });
}
