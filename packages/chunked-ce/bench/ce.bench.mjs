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

const cpuMs = (since) => {
  const { user, system } = process.cpuUsage(since);
  return (user + system) / 1000;
};

/**
 * The variants take turns, so that a busy moment of the machine hits all of them; the best counts. CPU time (of all threads) is what other jobs on the
 * machine disturb least. 'GEMMs alone': the two matrix products with chunks of the first size, which any implementation needs.
 */
function compare({ name, rows, width, vocab, chunks, options = {}, rounds }) {
  const scope = new Scope();
  const weight = random(scope.own(empty([vocab, width])), 4 / Math.sqrt(width));
  const source = random(scope.own(empty([rows, width])), 4);
  const hidden = scope.own(empty([rows, width]));
  const ids = Int32Array.from({ length: rows }, (_, i) => (i * 7919) % vocab);
  const labels = scope.own(fromTypedArray(ids, [rows]));
  const logits = scope.own(empty([chunks[0], vocab]));
  const gemms = () => {
    for (let at = 0; at < rows; at += chunks[0]) {
      gemm({ a: source.rows(at, chunks[0]), b: weight, c: logits, transB: true });
      gemm({ a: logits, b: weight, c: hidden.rows(at, chunks[0]) });
    }
  };
  const loss = (chunk) => (ws) => chunkedCrossEntropy({ hidden, weight, labels, chunk, dHidden: hidden, ws, ...options }).loss;
  const variants = [
    { label: 'GEMMs alone', run: gemms },
    { label: 'whole logits', run: loss(rows) },
    ...chunks.map((chunk) => ({ label: `chunk ${chunk}`, run: loss(chunk) })),
  ].map((v) => ({ ...v, wall: Number.POSITIVE_INFINITY, cpu: Number.POSITIVE_INFINITY, ws: new Workspace() }));
  for (let round = 0; round <= rounds; round++) {
    for (const v of variants) {
      hidden.data().set(source.data());
      resetPeak();
      const before = deviceMemory('cpu').liveBytes - v.ws.capacity;
      const [since, start] = [process.cpuUsage(), performance.now()];
      v.loss = v.run(v.ws);
      if (round > 0) {
        v.wall = Math.min(v.wall, performance.now() - start);
        v.cpu = Math.min(v.cpu, cpuMs(since));
      } // the first round touches memory for the first time
      v.peak = deviceMemory('cpu').peakBytes - before;
    }
  }
  console.log(`\n${name}: ${rows} rows x ${width} x ${vocab} words`);
  for (const { label, wall, cpu, peak, ws, loss: value } of variants) {
    const memory = value === undefined ? '' : `  extra memory ${(peak / MiB).toFixed(1).padStart(6)} MiB  loss ${value.toFixed(5)}`;
    console.log(
      `  ${label.padEnd(12)} ${wall.toFixed(0).padStart(6)} ms, ${cpu.toFixed(0).padStart(6)} ms of CPU (${(cpu / variants[0].cpu).toFixed(2)} x GEMMs)${memory}`,
    );
    ws.dispose();
  }
  scope.dispose();
}

console.log(`f32, ${numThreads()} threads, loss and d(hidden) in place of hidden`);
compare({ name: 'small', rows: 4096, width: 384, vocab: 8192, chunks: [512, 64], rounds: small ? 2 : 5 });
compare({
  name: 'Gemma-like: soft cap 30, smoothing, z-loss',
  rows: 1024,
  width: 384,
  vocab: 32768,
  chunks: [256, 64],
  rounds: small ? 2 : 5,
  options: { softCap: 30, labelSmoothing: 0.1, zLoss: 1e-4 },
});
if (!small) compare({ name: 'gpt-oss', rows: 512, width: 2880, vocab: 201088, chunks: [128, 32], rounds: 2 });
