/** `lc bench attention`: causal TFLOP/s at gpt-oss's and Llama's heads. 4 FLOPs forward and 10 backward per visible pair, head and dim. */
import { attentionBackward, attentionForward } from '@lc/attention';
import { type DeviceLike, type DType, empty, fill, Scope, type Tensor, Workspace } from '@lc/tensor';
import { noise } from './bandwidth.js';
import { Clock } from './clock.js';
import { floorRates, visiblePairs } from './flops.js';
import { count, fixed, newReport, type Report, type Row, text } from './report.js';

interface Shape {
  /** Queries, after so many earlier keys. */
  tokens: number;
  start?: number;
  window?: number;
  heads: number;
  kvHeads: number;
  headDim: number;
}

const gptOss = { heads: 64, kvHeads: 8, headDim: 64 };
const shapes: Record<'cuda' | 'cpu', readonly Shape[]> = {
  cuda: [
    { tokens: 16384, ...gptOss },
    { tokens: 65536, ...gptOss },
    { tokens: 8192, start: 57344, ...gptOss },
    { tokens: 16384, window: 128, ...gptOss },
    { tokens: 65536, window: 128, ...gptOss },
    { tokens: 16384, heads: 32, kvHeads: 8, headDim: 128 },
    { tokens: 8192, heads: 16, kvHeads: 8, headDim: 256 },
  ],
  cpu: [
    { tokens: 256, heads: 8, kvHeads: 2, headDim: 64 },
    { tokens: 256, window: 32, heads: 8, kvHeads: 2, headDim: 64 },
  ],
};

async function measure(clock: Clock, device: DeviceLike, shape: Shape): Promise<Row> {
  const { tokens: n, start = 0, window = null, heads, kvHeads, headDim: d } = shape;
  using scope = new Scope();
  using ws = new Workspace({ device });
  const make = (size: number[], dtype: DType): Tensor => scope.own(empty(size, { dtype, device, label: 'bench' }));
  const rows = [n, heads, d];
  const kv = [start + n, kvHeads, d];
  const random = (size: number[], seed: number): Tensor => noise(scope, device, size, { seed });
  const [q, k, v, dout] = [random(rows, 1), random(kv, 2), random(kv, 3), random(rows, 4)];
  const [out, dq, lse] = [make(rows, ws.dtype), make(rows, ws.dtype), make([n, heads], 'f32')];
  const [dk, dv, sinks, dSinks] = [make(kv, 'f32'), make(kv, 'f32'), make([heads], 'f32'), make([heads], 'f32')];
  for (const t of [dk, dv, sinks, dSinks]) fill(t, 0);
  const args = { q, k, v, out, lse, start, window, sinks, ws };
  const forwardMs = await clock.time(() => attentionForward(args));
  const gradients = { ...args, dout, dq, dk, dv, dSinks };
  const backwardMs = await clock.time(() => attentionBackward(gradients));
  const unorderedMs = await clock.time(() => attentionBackward({ ...gradients, deterministic: false }));
  const pairs = visiblePairs(start + n, window) - visiblePairs(start, window);
  const rate = (perPair: number, ms: number): number => (perPair * pairs * heads * d) / ms / 1e9;
  return {
    ...{ heads: `${heads}/${kvHeads} x ${d}`, tokens: n, start, window, forwardMs, backwardMs, unorderedMs },
    ...{ forwardTflops: rate(4, forwardMs), backwardTflops: rate(10, backwardMs), unorderedTflops: rate(10, unorderedMs) },
    ...(device === 'cpu' ? {} : { floorMs: (14 * pairs * heads * d) / floorRates.attention / 1e-3 }),
  };
}

export async function benchAttention(device: DeviceLike): Promise<Report> {
  const onGpu = device !== 'cpu';
  const report = newReport('attention', device);
  using clock = new Clock(device);
  const rows: Row[] = [];
  for (const shape of shapes[onGpu ? 'cuda' : 'cpu']) rows.push(await measure(clock, device, shape));
  const digits = onGpu ? 0 : 4;
  report.tables.push({
    title: 'Causal attention with sinks; backward with the gradient of the sinks',
    columns: [
      ['heads', text('heads')],
      [
        'tokens',
        (r) =>
          `${count(r.tokens as number)}${r.start ? ` after ${count(r.start as number)}` : ''}${r.window ? `, window ${r.window}` : ''}`,
      ],
      ['forward, ms', fixed('forwardMs', 2)],
      ['TFLOP/s', fixed('forwardTflops', digits)],
      ['backward, ms', fixed('backwardMs', 2)],
      ['TFLOP/s', fixed('backwardTflops', digits)],
      ['backward in no fixed order, ms', fixed('unorderedMs', 2)],
      ['TFLOP/s', fixed('unorderedTflops', digits)],
      ['both at 450 TFLOP/s, ms', fixed('floorMs', 2)],
    ],
    rows,
  });
  return report;
}
