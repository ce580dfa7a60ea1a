/** Attention at gpt-oss's heads (64 query, 8 K/V, head dim 64): causal TFLOP/s, 4 (forward) and 10 (backward) per visible pair, head and dim. */
import { attentionBackward, attentionForward } from '@lc/attention';
import { copy, type DType, defaultStream, devices, Event, empty, fill, fromTypedArray, Scope, type Tensor, Workspace } from '@lc/tensor';
import { randomNormal as random } from '../../packages/tensor/src/seeded.js';

async function time(fn: () => void): Promise<number> {
  using start = new Event('cuda', { timing: true });
  using end = new Event('cuda', { timing: true });
  const stream = defaultStream('cuda');
  fn();
  const times: number[] = [];
  for (let round = 0; round < 7 && times.reduce((a, b) => a + b, 0) < 1500; round++) {
    start.record(stream);
    fn();
    end.record(stream);
    await end.sync();
    times.push(end.elapsedSince(start));
  }
  times.sort((a, b) => a - b);
  return times[Math.floor(times.length / 2)] as number;
}

async function measure(n: number, start: number, window: number | null, heads = 64, kvHeads = 8, d = 64): Promise<void> {
  using scope = new Scope();
  using ws = new Workspace({ device: 'cuda' });
  const make = (shape: number[], dtype: DType = 'bf16'): Tensor => scope.own(empty(shape, { dtype, device: 'cuda' }));
  const noise = (shape: number[], seed: number): Tensor => {
    const out = make(shape);
    const count = shape.reduce((a, b) => a * b, 1);
    using source = fromTypedArray(random(1 << 20, seed), [1 << 20]);
    using low = empty([1 << 20], { dtype: 'bf16' });
    copy(low, source);
    const flat = out.view([count]);
    for (let at = 0; at < count; at += 1 << 20)
      copy(flat.rows(at, Math.min(1 << 20, count - at)), low.rows(0, Math.min(1 << 20, count - at)));
    return out;
  };
  const [rows, kv] = [
    [n, heads, d],
    [start + n, kvHeads, d],
  ];
  const [q, k, v, dout] = [noise(rows, 1), noise(kv, 2), noise(kv, 3), noise(rows, 4)];
  const [out, dq, lse, dk, dv] = [make(rows), make(rows), make([n, heads], 'f32'), make(kv, 'f32'), make(kv, 'f32')];
  const [sinks, dSinks] = [make([heads], 'f32'), make([heads], 'f32')];
  for (const t of [dk, dv, sinks, dSinks]) fill(t, 0);
  const args = { q, k, v, out, lse, start, window, sinks, ws };
  const forward = await time(() => attentionForward(args));
  const backward = await time(() => attentionBackward({ ...args, dout, dq, dk, dv, dSinks }));
  let pairs = n * start + (n * (n + 1)) / 2;
  if (window !== null && window <= start) pairs = n * window;
  else if (window !== null) pairs = n * window - (window * (window - 1)) / 2;
  const rate = (products: number, ms: number): string => ((2 * products * pairs * heads * d) / ms / 1e9).toFixed(0);
  console.log(
    `| ${heads}/${kvHeads} x ${d}, ${n}${start ? ` after ${start}` : ''}${window ? `, window ${window}` : ''} | ${forward.toFixed(2)} ms, ${rate(2, forward)} | ${backward.toFixed(2)} ms, ${rate(5, backward)} |`,
  );
}

export async function benchAttention(): Promise<void> {
  console.log(`${devices().find((d) => d.device === 'cuda:0')?.name}; bf16, with sinks, deterministic`);
  console.log('| heads, tokens | forward, TFLOP/s | backward, TFLOP/s |\n|---|---|---|');
  await measure(16384, 0, null);
  await measure(65536, 0, null);
  await measure(8192, 57344, null);
  await measure(16384, 0, 128);
  await measure(65536, 0, 128);
  await measure(16384, 0, null, 32, 8, 128);
}
