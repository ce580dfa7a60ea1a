import { spawnSync } from 'node:child_process';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';

const addon = join(dirname(dirname(fileURLToPath(import.meta.url))), 'prebuilds/linux-x64/@lc+tensor.glibc.node');

// The thread count and the kernels are chosen once per process, so each combination is a process of its own; plain native calls need no loader.
const prelude = `
const native = require(${JSON.stringify(addon)});
const dtypes = new Map([[Float32Array, 0], [Int32Array, 3]]);
function tensor(array, shape) {
  const strides = shape.map((_, i) => shape.slice(i + 1).reduce((a, b) => a * b, 1));
  const code = dtypes.get(array.constructor);
  return { handle: native.fromTypedArray(array, code, shape, 't'), meta: Float64Array.of(0, code, shape.length, ...shape, ...strides), label: 't', array };
}
let state = 1;
const random = () => { state = (Math.imul(state, 1664525) + 1013904223) >>> 0; return state / 2 ** 32 - 0.5; };
const f32 = (shape) => tensor(Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, random), shape);
`;
const compute = `${prelude}
let hash = 2166136261;
const mix = (array) => { const words = new Uint32Array(array.buffer); for (const w of words) hash = Math.imul(hash ^ w, 16777619); };
let worst = 0;
const sizes = [[1, 1, 1], [7, 131, 64], [131, 7, 131], [15, 33, 17], [64, 64, 64], [169, 40, 700], [300, 200, 100], [1, 300, 333], [200, 1, 50]];
for (const [m, n, k] of sizes) {
  for (const transA of [false, true]) {
    for (const transB of [false, true]) {
      const [a, b, c] = [f32(transA ? [k, m] : [m, k]), f32(transB ? [n, k] : [k, n]), f32([m, n])];
      const before = c.array.slice();
      native.gemm({ a, b, c, transA, transB, alpha: -0.5, beta: 0.25 });
      mix(c.array);
      for (let i = 0; i < m && native.numThreads() === 1; i++) {
        for (let j = 0; j < n; j++) {
          let sum = 0;
          let scale = 0;
          for (let p = 0; p < k; p++) {
            const term = -0.5 * a.array[transA ? p * m + i : i * k + p] * b.array[transB ? j * k + p : p * n + j];
            sum += term;
            scale += Math.abs(term);
          }
          sum += 0.25 * before[i * n + j];
          scale += Math.abs(0.25 * before[i * n + j]);
          worst = Math.max(worst, Math.abs(c.array[i * n + j] - sum) / scale / Math.sqrt(k + 1) * 2 ** 24);
        }
      }
    }
  }
}
const offsets = tensor(Int32Array.of(0, 170, 170, 400), [4]);
for (const transB of [false, true]) {
  const [a, b, c, dw] = [f32([400, 48]), f32(transB ? [3, 200, 48] : [3, 48, 200]), f32([400, 200]), f32([3, 48, 200])];
  native.groupedGemm({ a, b, c, offsets, transB });
  native.groupedGemmWeightGrad({ a, b: c, c: dw, offsets, beta: 1 });
  mix(c.array);
  mix(dw.array);
}
const [x, weight, dout, dx, dWeight, sums] = [f32([1000, 96]), f32([96]), f32([1000, 96]), f32([1000, 96]), f32([96]), f32([96])];
native.rmsNormBackward({ x, weight, dout, dx, eps: 1e-5, accumulate: true, dWeight });
native.sumRows({ x: dx, out: sums });
for (const t of [dx, dWeight, sums]) mix(t.array);
console.log(JSON.stringify({ threads: native.numThreads(), hash: hash >>> 0, worst }));
`;

function run(
  script: string,
  env: Record<string, string>,
): { status: number | null; signal: string | null; stdout: string; stderr: string } {
  return spawnSync(process.execPath, ['-e', script], { env: { ...process.env, ...env }, encoding: 'utf8', timeout: 60_000 });
}

describe.each(['avx512', 'avx2', 'portable'])('the %s kernels', (kernels) => {
  it('agree with f64, and give the same bits on any number of threads', () => {
    const hashes = [1, 2, 3, 8].map((threads) => {
      const { stdout, stderr } = run(compute, { LCTX_NUM_THREADS: String(threads), LCTX_CPU_KERNELS: kernels });
      expect(stderr).toBe('');
      const result = JSON.parse(stdout) as { threads: number; hash: number; worst: number };
      expect(result.threads).toBe(threads);
      expect(result.worst).toBeLessThan(4); // units of sqrt(k) half-ulps of the terms' magnitudes
      return result.hash;
    });
    expect(new Set(hashes).size).toBe(1);
  });
});

describe('the thread pool', () => {
  it('lets the process end while workers compute', () => {
    const busy = `${prelude}
const { Worker } = require('node:worker_threads');
const [a, b, c] = [f32([256, 256]), f32([256, 256]), f32([256, 256])];
const once = () => native.gemm({ a, b, c });
once();
const workers = Array.from({ length: 2 }, () => new Worker(${JSON.stringify(`${prelude}
const [a, b, c] = [f32([256, 256]), f32([256, 256]), f32([256, 256])];
require('node:worker_threads').parentPort.postMessage('busy');
for (;;) native.gemm({ a, b, c });
`)}, { eval: true }));
let ready = 0;
for (const w of workers) w.on('message', () => { if (++ready === 2) setTimeout(() => { once(); console.log('bye'); process.exit(0); }, 50); });
`;
    const { status, signal, stdout, stderr } = run(busy, { LCTX_NUM_THREADS: '4' });
    expect({ status, signal, stdout, stderr }).toEqual({ status: 0, signal: null, stdout: 'bye\n', stderr: '' });
  });

  it('ignores a nonsensical LCTX_NUM_THREADS', () => {
    for (const threads of ['0', '-3', 'many', '']) {
      const { stdout } = run(`${prelude} console.log(native.numThreads())`, { LCTX_NUM_THREADS: threads });
      expect(Number(stdout)).toBeGreaterThanOrEqual(1);
      expect(Number(stdout)).toBeLessThanOrEqual(1024);
    }
  });
});
