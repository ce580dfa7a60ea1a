// Row ops beside a plain copy of the same bytes: node bench/rowops.bench.mjs. Build first (npm run build).
import { cpus } from 'node:os';
import {
  add,
  addBias,
  axpy,
  copy,
  embeddingGather,
  embeddingScatterAdd,
  empty,
  fromTypedArray,
  numThreads,
  rmsNorm,
  rmsNormBackward,
  scale,
  sumRows,
  zeros,
} from '../dist/index.js';

const [tokens, width, vocab] = [4096, 2880, 32000];
const tensor = (shape) => {
  const t = empty(shape);
  t.data().forEach((_, i, d) => {
    d[i] = Math.random() - 0.5;
  });
  return t;
};
const [x, y, out] = [tensor([tokens, width]), tensor([tokens, width]), tensor([tokens, width])];
const [weight, sums] = [tensor([width]), zeros([width])];
const [bf16, f16] = ['bf16', 'f16'].map((dtype) => empty([tokens, width], { dtype }));
const table = empty([vocab, width], { dtype: 'bf16' });
const dTable = zeros([vocab, width]);
const ids = fromTypedArray(
  Int32Array.from({ length: tokens }, () => Math.floor(Math.random() * vocab)),
  [tokens],
);
copy(bf16, x);
copy(f16, x);

const n = tokens * width;
// name, bytes read and written, call
const ops = [
  ['copy f32', 8 * n, () => copy(out, x)],
  ['copy f32 to bf16', 6 * n, () => copy(bf16, x)],
  ['copy bf16 to f32', 6 * n, () => copy(out, bf16)],
  ['copy f32 to f16', 6 * n, () => copy(f16, x)],
  ['copy f16 to f32', 6 * n, () => copy(out, f16)],
  ['add', 12 * n, () => add({ a: x, b: y, out })],
  ['axpy', 12 * n, () => axpy({ x, y: out, alpha: 1e-6 })],
  ['scale', 8 * n, () => scale({ x: out, factor: 1 })],
  ['addBias', 8 * n, () => addBias({ x: out, bias: weight })],
  ['sumRows', 4 * n, () => sumRows({ x, out: sums })],
  ['rmsNorm', 8 * n, () => rmsNorm({ x, weight, out, eps: 1e-5 })],
  ['rmsNormBackward', 12 * n, () => rmsNormBackward({ x, weight, dout: y, dx: out, eps: 1e-5 })],
  ['rmsNormBackward, dWeight', 12 * n, () => rmsNormBackward({ x, weight, dout: y, dx: out, eps: 1e-5, dWeight: sums })],
  ['embeddingGather bf16', 6 * n, () => embeddingGather({ table, ids, out })],
  ['embeddingScatterAdd', 12 * n, () => embeddingScatterAdd({ dout: x, ids, dTable })],
];
console.log(`${cpus()[0].model}, ${numThreads()} thread(s), [${tokens}, ${width}]\n\n| op | ms | GB/s |\n|---|---|---|`);
for (const [name, bytes, run] of ops) {
  let best = Number.POSITIVE_INFINITY;
  for (let i = 0, spent = 0; i < 5 || spent < 0.5; i++) {
    const start = process.hrtime.bigint();
    run();
    const seconds = Number(process.hrtime.bigint() - start) / 1e9;
    best = Math.min(best, seconds);
    spent += seconds;
  }
  console.log(`| ${name} | ${(best * 1e3).toFixed(2)} | ${(bytes / best / 1e9).toFixed(1)} |`);
}
