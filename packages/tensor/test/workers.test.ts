import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { MessageChannel, Worker } from 'node:worker_threads';
import { expect, it } from 'vitest';
import { deviceMemory, fromTypedArray, gemm, Workspace, zeros } from '../src/index.js';
import { expectNoLeaks } from '../src/testing.js';

expectNoLeaks();
const addon = join(dirname(dirname(fileURLToPath(import.meta.url))), 'prebuilds/linux-x64/@lc+tensor.glibc.node');

// Plain native calls: a worker has no TypeScript loader.
const script = `
const { parentPort, workerData } = require('node:worker_threads');
const native = require(workerData.addon);
const n = 128;
const make = (value) => {
  const array = new Float32Array(n * n).fill(value);
  return { handle: native.fromTypedArray(array, 0, [n, n], 'worker'), meta: Float64Array.of(0, 0, 2, n, n, n, 1), label: 'worker', array };
};
let sum = 0;
for (let round = 0; round < 30; round++) {
  const [a, b, c] = [make(1), make(2), make(0)];
  const counted = native.alloc(0, [1000], 1, 0, true, 'worker');
  native.gemm({ a, b, c });
  sum += c.array[5];
  for (const t of [a, b, c]) native.dispose(t.handle);
  native.dispose(counted);
}
parentPort.postMessage({ sum, adopted: native.adopted });
`;

it('several workers use one table, allocator and pool at once, and exit cleanly', async () => {
  const run = (): Promise<{ sum: number; adopted: boolean }> =>
    new Promise((resolve, reject) => {
      const worker = new Worker(script, { eval: true, workerData: { addon } });
      let result: { sum: number; adopted: boolean };
      worker.on('message', (message) => {
        result = message;
      });
      worker.on('error', reject);
      worker.on('exit', (code) => (code === 0 ? resolve(result) : reject(new Error(`worker exited with ${code}`))));
    });
  const pending = [run(), run(), run()];
  using a = zeros([256, 256]);
  using b = fromTypedArray(new Float32Array(65536).fill(1), [256, 256]);
  using c = zeros([256, 256]);
  for (let i = 0; i < 50; i++) gemm({ a, b, c });
  const results = await Promise.all(pending);
  for (const r of results) expect(r).toEqual({ sum: 30 * 256, adopted: false });
  expect(deviceMemory('cpu').byLabel.worker?.liveTensors).toBe(0);
});

it('a tensor does not cross to another thread: the error names it and what to do instead', () => {
  using t = zeros([4], { label: 'checkpoints' });
  using ws = new Workspace({ bytes: 100, label: 'scratch' });
  t.data();
  const refused = (label: string) =>
    expect.objectContaining({ code: 'ERR_LC_THREAD', message: expect.stringMatching(`tensor '${label}' cannot be`) });
  for (const [what, label] of [
    [t, 'checkpoints'],
    [t.rows(1, 2), 'checkpoints'],
    [{ deep: [t] }, 'checkpoints'],
    [ws, 'scratch'],
  ] as const) {
    expect(() => structuredClone(what)).toThrow(refused(label));
  }
  const { port1 } = new MessageChannel();
  expect(() => port1.postMessage({ x: t })).toThrow(refused('checkpoints'));
  port1.close();
  expect(() => new Worker('', { eval: true, workerData: t })).toThrow(refused('checkpoints'));
  expect(() => structuredClone(t.handle)).toThrow(/could not be cloned/);
  expect(JSON.stringify({ x: t.rows(1, 2) })).toBe(`{"x":"f32[2] on cpu ('checkpoints')"}`);
});
