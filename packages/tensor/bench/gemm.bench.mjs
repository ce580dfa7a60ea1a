// f32 GEMM from JavaScript beside OpenBLAS from C, in one run: node bench/gemm.bench.mjs [threads...]
// Build first (npm run build). Each shape is measured in turns, several times; the best counts, since other load only slows.
import { spawnSync } from 'node:child_process';
import { cpus } from 'node:os';
import { fileURLToPath } from 'node:url';
import { empty, gemm, numThreads } from '../dist/index.js';
import { openblas } from './openblas.mjs';

// m, n, k: squares; projections, LoRA and expert shapes of training; one attention block; few rows.
const shapes = [
  [256, 256, 256],
  [1024, 1024, 1024],
  [2048, 2048, 2048],
  [4096, 384, 192],
  [512, 4096, 192],
  [4096, 64, 192],
  [4096, 192, 64],
  [1024, 512, 2880],
  [4096, 16, 192],
  [16, 2880, 720],
  [64, 64, 64],
  [131, 131, 131],
  [7, 1024, 1024],
  [1, 1024, 1024],
];

if (!process.env.LCTX_NUM_THREADS) {
  // The pool's size is fixed when it starts: one process for each.
  const counts = process.argv.length > 2 ? process.argv.slice(2).map(Number) : [...new Set([1, numThreads()])];
  for (const n of counts) {
    spawnSync(process.execPath, [fileURLToPath(import.meta.url)], {
      stdio: 'inherit',
      env: { ...process.env, LCTX_NUM_THREADS: String(n) },
    });
  }
  process.exit();
}

const random = (t) => {
  const d = t.data();
  for (let i = 0; i < d.length; i++) d[i] = Math.random() - 0.5;
  return t;
};

/** GFLOP/s. */
function measure(m, n, k, transB) {
  const a = random(empty([m, k]));
  const b = random(empty(transB ? [n, k] : [k, n]));
  const c = empty([m, n]);
  const flops = 2 * m * n * k;
  const repeat = 1 + Math.floor(1e8 / flops);
  let best = Number.POSITIVE_INFINITY;
  for (let i = 0, spent = 0; i < 5 || spent < 0.2; i++) {
    const start = process.hrtime.bigint();
    for (let r = 0; r < repeat; r++) gemm({ a, b, c, transB });
    const seconds = Number(process.hrtime.bigint() - start) / 1e9;
    best = Math.min(best, seconds / repeat);
    spent += seconds;
  }
  for (const t of [a, b, c]) t.dispose();
  return flops / best / 1e9;
}

const peer = openblas();
const core = peer ? ` (${peer.measure(1, 8, 8, 8, false).core} kernels)` : ': not found';
console.log(`\n${cpus()[0].model}, ${numThreads()} thread(s), f32 GFLOP/s; OpenBLAS${core}\n`);
console.log('| m x n x k | b | lc | OpenBLAS | ratio |\n|---|---|---|---|---|');
for (const [m, n, k] of shapes) {
  for (const transB of [false, true]) {
    let [ours, theirs] = [0, 0];
    for (let round = 0; round < 3; round++) {
      ours = Math.max(ours, measure(m, n, k, transB));
      if (peer) theirs = Math.max(theirs, peer.measure(numThreads(), m, n, k, transB).gflops);
    }
    const beside = peer ? `${theirs.toFixed(1)} | ${(ours / theirs).toFixed(2)}` : ' | ';
    console.log(`| ${m} x ${n} x ${k} | ${transB ? 'n x k' : 'k x n'} | ${ours.toFixed(1)} | ${beside} |`);
  }
}
peer?.close();
