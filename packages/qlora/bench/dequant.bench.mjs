// Quantize, dequantize, LoRA and optimizer speed beside memcpy, in one run: node bench/dequant.bench.mjs
// Build the packages first (npm run build). GB/s count the bytes written (f32 or bf16), as memcpy's do. LCTX_NUM_THREADS sets the threads.
import { cpus } from 'node:os';
import { empty, fill, numThreads, PlainLinear, Workspace } from '@lc/tensor';
import { AdamW, LoraLinear, Mxfp4Weight, Nf4Weight } from '../dist/index.js';

const shape = [2880, 5760];
const n = shape[0] * shape[1];
const x = empty(shape);
const d = x.data();
for (let i = 0; i < n; i++) d[i] = Math.random() - 0.5;

/** Best of several runs, in seconds. */
function time(fn) {
  let best = Number.POSITIVE_INFINITY;
  for (let i = 0, spent = 0; i < 5 || spent < 0.5; i++) {
    const start = process.hrtime.bigint();
    fn();
    const seconds = Number(process.hrtime.bigint() - start) / 1e9;
    best = Math.min(best, seconds);
    spent += seconds;
  }
  return best;
}
const row = (name, seconds, bytes) =>
  console.log(`${name.padEnd(44)} ${(seconds * 1e3).toFixed(2).padStart(9)} ms ${(bytes / seconds / 1e9).toFixed(2).padStart(8)} GB/s`);

console.log(`${cpus()[0].model.trim()}, ${numThreads()} threads, weight [${shape}], best of runs`);
const out = empty(shape);
const half = empty(shape, { dtype: 'bf16' });
const memcpy = time(() => out.data().set(d));
row('memcpy f32 (one thread)', memcpy, 4 * n);
row(
  'fill f32',
  time(() => fill(out, 1)),
  4 * n,
);
for (const [name, w] of [
  ['NF4', Nf4Weight.quantize(x, { doubleQuant: false })],
  ['NF4, double quantization', Nf4Weight.quantize(x)],
  ['MXFP4', Mxfp4Weight.quantize(x)],
]) {
  row(
    `dequantize ${name} to f32`,
    time(() => w.dequantize(out)),
    4 * n,
  );
  row(
    `dequantize ${name} to bf16`,
    time(() => w.dequantize(half)),
    2 * n,
  );
  w.dispose();
}
row(
  'quantize NF4, double quantization (of f32)',
  time(() => Nf4Weight.quantize(x).dispose()),
  4 * n,
);
row(
  'quantize MXFP4 (of f32)',
  time(() => Mxfp4Weight.quantize(x).dispose()),
  4 * n,
);

const ws = new Workspace({ bytes: 1 << 28 });
const [rows, width] = [2048, 1024];
const weight = empty([width, width]);
const xs = empty([rows, width]);
const ys = empty([rows, width]);
const dx = empty([rows, width]);
for (const t of [weight, xs, ys]) fill(t, 0.01);
const base = new PlainLinear({ weight });
const at = { start: 0, length: rows, docStart: null, dropoutSeed: 1 };
const lora = new LoraLinear({ base, r: 8, name: 'bench' });
const dropped = new LoraLinear({ base, r: 8, name: 'bench', loraDropout: 0.1 });
const ms = (name, fn) => console.log(`${name.padEnd(44)} ${(time(fn) * 1e3).toFixed(2).padStart(9)} ms`);
ms(`base forward ${rows} x ${width} x ${width}`, () => base.forward(xs, ys, at, ws));
ms('  with LoRA r 8', () => lora.forward(xs, ys, at, ws));
ms('  with LoRA r 8, dropout 0.1', () => dropped.forward(xs, ys, at, ws));
ms('base backward', () => base.backward(xs, ys, dx, at, ws));
ms('  with LoRA r 8', () => lora.backward(xs, ys, dx, at, ws));
ms('  with LoRA r 8, dropout 0.1', () => dropped.backward(xs, ys, dx, at, ws));
for (const optimBits of [32, 8]) {
  const count = 4 << 20;
  const value = empty([count]);
  const grad = empty([count]);
  fill(value, 1);
  fill(grad, 1e-3);
  const optimizer = new AdamW([{ name: 'p', value, grad }], { optimBits });
  ms(`AdamW step, ${optimBits}-bit states, ${count} parameters`, () => optimizer.step({ maxGradNorm: 1 }));
  for (const t of [optimizer, value, grad]) t.dispose();
}
for (const t of [x, out, half, ws, weight, xs, ys, dx, lora, dropped]) t.dispose();
