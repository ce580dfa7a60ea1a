// Loss and gradient, chunked against the whole logits at once: time, peak memory, and the share of the two GEMMs. CPU, f32.
// Once built: node bench/ce.bench.mjs [--small]
import { deviceMemory, empty, fromTypedArray, gemm, numThreads, resetPeak, Scope, Workspace } from '@lc/tensor';
import { chunkedCrossEntropy } from '../dist/index.js';

const small = process.argv.includes('--small');
const MiB = 2 ** 20;

function random(t, scale) {
  const values = t.data();
  let state = 12345;
  for (let i = 0; i < values.length; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    values[i] = (state / 2 ** 32 - 0.5) * scale;
  }
  return t;
}

/** The variants take turns, so that a busy moment of the machine hits all of them; the best counts. */
function compare({ name, rows, width, vocab, chunks, options = {}, rounds }) {
  const scope = new Scope();
  const weight = random(scope.own(empty([vocab, width])), 4 / Math.sqrt(width));
  const source = random(scope.own(empty([rows, width])), 4);
  const hidden = scope.own(empty([rows, width]));
  const ids = Int32Array.from({ length: rows }, (_, i) => (i * 7919) % vocab);
  const labels = scope.own(fromTypedArray(ids, [rows]));
  const variants = [rows, ...chunks].map((chunk) => ({ chunk, best: Number.POSITIVE_INFINITY, peak: 0, loss: 0 }));
  let floor = Number.POSITIVE_INFINITY;
  for (let round = 0; round < rounds; round++) {
    const piece = Math.min(rows, chunks[0]);
    const logits = empty([piece, vocab]);
    const began = performance.now();
    gemm({ a: source.rows(0, piece), b: weight, c: logits, transB: true });
    gemm({ a: logits, b: weight, c: hidden.rows(0, piece) });
    floor = Math.min(floor, ((performance.now() - began) * rows) / piece);
    logits.dispose();
    for (const v of variants) {
      hidden.data().set(source.data());
      const ws = new Workspace();
      resetPeak();
      const before = deviceMemory('cpu').liveBytes;
      const start = performance.now();
      v.loss = chunkedCrossEntropy({ hidden, weight, labels, chunk: v.chunk, dHidden: hidden, ws, ...options }).loss;
      v.best = Math.min(v.best, performance.now() - start);
      v.peak = deviceMemory('cpu').peakBytes - before;
      ws.dispose();
    }
  }
  scope.dispose();
  console.log(`\n${name}: ${rows} rows x ${width} x ${vocab} words; the two GEMMs alone ${floor.toFixed(0)} ms`);
  for (const v of variants) {
    const label = v.chunk === rows ? 'whole logits' : `chunk ${v.chunk}`;
    console.log(
      `  ${label.padEnd(14)} ${v.best.toFixed(0).padStart(6)} ms (${(v.best / floor).toFixed(2)} x the GEMMs)  extra memory ${(v.peak / MiB).toFixed(1).padStart(7)} MiB  loss ${v.loss.toFixed(5)}`,
    );
  }
}

console.log(`f32, ${numThreads()} threads, loss and d(hidden) in place of hidden`);
compare({ name: 'small', rows: 4096, width: 384, vocab: 8192, chunks: [512, 64], rounds: small ? 2 : 4 });
compare({
  name: 'Gemma-like: soft cap 30, smoothing, z-loss',
  rows: 1024,
  width: 384,
  vocab: 32768,
  chunks: [256, 64],
  rounds: small ? 2 : 4,
  options: { softCap: 30, labelSmoothing: 0.1, zLoss: 1e-4 },
});
if (!small) compare({ name: 'gpt-oss', rows: 512, width: 2880, vocab: 201088, chunks: [128, 32], rounds: 2 });
