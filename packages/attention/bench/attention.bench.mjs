// Causal attention beside this machine's f32 GEMM, in one run: node bench/attention.bench.mjs [tokens] [heads] [kvHeads] [headDim] [window]
// Build the packages first (npm run build). Runs itself once per thread count (LCTX_NUM_THREADS), 1 and 2 unless THREADS=1,4,8 says otherwise.
import { execFileSync } from 'node:child_process';
import { cpus } from 'node:os';
import { fileURLToPath } from 'node:url';
import { empty, gemm, numThreads, Workspace, zeros } from '@lc/tensor';
import { attentionBackward, attentionForward, ropeForward, ropeInit } from '../dist/index.js';

const [tokens, heads, kvHeads, headDim, window] = [4096, 4, 2, 64, 0].map((value, i) => Number(process.argv[2 + i] ?? value));

const random = (t) => {
  const d = t.data();
  for (let i = 0; i < d.length; i++) d[i] = Math.random() + Math.random() + Math.random() + Math.random() - 2;
  return t;
};

/** Seconds of the best of at least five runs. */
function best(fn) {
  let least = Number.POSITIVE_INFINITY;
  for (let i = 0, spent = 0; i < 5 || spent < 1; i++) {
    const start = process.hrtime.bigint();
    fn();
    const seconds = Number(process.hrtime.bigint() - start) / 1e9;
    least = Math.min(least, seconds);
    spent += seconds;
  }
  return least;
}

function measure() {
  const size = 1024;
  const [a, b, c] = [random(empty([size, size])), random(empty([size, size])), empty([size, size])];
  const peak = (2 * size ** 3) / best(() => gemm({ a, b, c })) / 1e9;

  const rows = [tokens, heads, headDim];
  const kv = [tokens, kvHeads, headDim];
  const [q, k, v, dout] = [random(empty(rows)), random(empty(kv)), random(empty(kv)), random(empty(rows))];
  const [out, dq, lse, dk, dv] = [empty(rows), empty(rows), empty([tokens, heads]), zeros(kv), zeros(kv)];
  const ws = new Workspace();
  const args = { q, k, v, out, lse, start: 0, window: window || null, ws };
  let pairs = 0; // query-key pairs that are visible: the work that counts
  for (let i = 0; i < tokens; i++) pairs += Math.min(i + 1, window || Number.POSITIVE_INFINITY);
  const flops = 4 * pairs * heads * headDim;
  const forward = best(() => attentionForward(args));
  const backward = best(() => attentionBackward({ ...args, dout, dq, dk, dv }));
  const rope = ropeInit({ ropeType: 'default', ropeTheta: 150000 }, { headDim, maxPositionEmbeddings: tokens });
  const turn = best(() => ropeForward({ x: q, start: 0, rope }));
  const line = (name, seconds, work) => {
    const rate = work / seconds / 1e9;
    console.log(
      `  ${name}  ${(seconds * 1e3).toFixed(1).padStart(7)} ms  ${rate.toFixed(1).padStart(6)} GFLOP/s  ${((100 * rate) / peak).toFixed(0).padStart(3)}% of GEMM`,
    );
  };
  console.log(`${numThreads()} thread${numThreads() > 1 ? 's' : ''}: f32 GEMM ${size}^3 ${peak.toFixed(1)} GFLOP/s`);
  line('forward ', forward, flops);
  line('backward', backward, 2.5 * flops); // five products where forward has two
  console.log(`  rope      ${(turn * 1e3).toFixed(2).padStart(7)} ms for q`);
}

if (process.env.ATTENTION_BENCH_CHILD) {
  measure();
} else {
  console.log(
    `${cpus()[0]?.model ?? 'unknown CPU'}: causal attention, ${tokens} tokens, ${heads}/${kvHeads} heads x ${headDim}${window ? `, window ${window}` : ''}`,
  );
  for (const threads of (process.env.THREADS ?? '1,2').split(',')) {
    execFileSync(process.execPath, [fileURLToPath(import.meta.url), ...process.argv.slice(2)], {
      stdio: 'inherit',
      env: { ...process.env, LCTX_NUM_THREADS: threads, ATTENTION_BENCH_CHILD: '1' },
    });
  }
}
