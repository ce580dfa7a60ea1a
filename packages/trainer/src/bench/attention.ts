/** `lc bench attention`: causal TFLOP/s at gpt-oss's and Llama's heads. 4 FLOPs forward and 10 backward per visible pair, head and dim. */
import { attentionBackward, attentionForward } from '@lc/attention';
import { type DeviceLike, type DType, empty, fill, LcError, Scope, type Tensor, Workspace } from '@lc/tensor';
import { copyRate, noise } from './bandwidth.js';
import { Clock, type TimeOptions } from './clock.js';
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
const llama = { heads: 32, kvHeads: 8, headDim: 128 };
/** By the names that test/gpu/peers/attention.py gives the same shapes. */
const shapes: Record<'cuda' | 'cpu', Record<string, Shape>> = {
  cuda: {
    '16k': { tokens: 16384, ...gptOss },
    '64k': { tokens: 65536, ...gptOss },
    '256k': { tokens: 262144, ...gptOss },
    chunk: { tokens: 8192, start: 57344, ...gptOss },
    '32k-after-512k': { tokens: 32768, start: 524288, ...gptOss },
    'window-16k': { tokens: 16384, window: 128, ...gptOss },
    'window-64k': { tokens: 65536, window: 128, ...gptOss },
    'window-256k': { tokens: 262144, window: 128, ...gptOss },
    'd128-16k': { tokens: 16384, ...llama },
    'd128-64k': { tokens: 65536, ...llama },
    'd256-8k': { tokens: 8192, heads: 16, kvHeads: 8, headDim: 256 },
  },
  cpu: {
    tiny: { tokens: 256, heads: 8, kvHeads: 2, headDim: 64 },
    'tiny-window': { tokens: 256, window: 32, heads: 8, kvHeads: 2, headDim: 64 },
  },
};
const usual = ['16k', '64k', 'chunk', 'window-16k', 'window-64k', 'd128-16k', 'd256-8k'];

/** Forward FLOPs from which a shape is timed once, after a warm-up on its first queries. */
const LONG = 2e14;
const WARM_QUERIES = 4096;

/** Milliseconds to move each operand once at the rate of a copy: q, k, v, out forward; those, dout, dq, dk and dv backward. */
function streamMs(tensors: readonly Tensor[], gbPerSecond: number): number {
  return tensors.reduce((sum, t) => sum + t.nbytes, 0) / gbPerSecond / 1e6;
}

async function measure(clock: Clock, device: DeviceLike, name: string, shape: Shape, copyGbPerSecond: number): Promise<Row> {
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
  const pairs = visiblePairs(start + n, window) - visiblePairs(start, window);
  const work = (perPair: number): number => perPair * pairs * heads * d;
  const first = (queries: number) => ({
    ...{ q: q.rows(0, queries), k, v, out: out.rows(0, queries), lse: lse.rows(0, queries), start, window, sinks, ws },
    ...{ dout: dout.rows(0, queries), dq: dq.rows(0, queries), dk, dv, dSinks },
  });
  const long = work(4) > LONG;
  const time = (launch: (args: ReturnType<typeof first>) => void): Promise<number> => {
    if (long) launch(first(WARM_QUERIES));
    const options: TimeOptions = long ? { warm: 0, budget: 500 } : {};
    const args = first(n);
    return clock.time(() => launch(args), options);
  };
  const forwardMs = await time((args) => attentionForward(args));
  const backwardMs = await time((args) => attentionBackward(args));
  const unorderedMs = await time((args) => attentionBackward({ ...args, deterministic: false }));
  const rate = (perPair: number, ms: number): number => work(perPair) / ms / 1e9;
  const [streamForwardMs, streamBackwardMs] = [
    streamMs([q, k, v, out], copyGbPerSecond),
    streamMs([q, k, v, out, dout, dq, dk, dv], copyGbPerSecond),
  ];
  return {
    ...{ name, heads: `${heads}/${kvHeads} x ${d}`, tokens: n, start, window, forwardMs, backwardMs, unorderedMs },
    ...{ forwardTflops: rate(4, forwardMs), backwardTflops: rate(10, backwardMs), unorderedTflops: rate(10, unorderedMs) },
    ...{ streamForwardMs, streamBackwardMs, forwardOfStream: forwardMs / streamForwardMs, backwardOfStream: backwardMs / streamBackwardMs },
    ...(device === 'cpu' ? {} : { floorMs: work(14) / floorRates.attention / 1e-3 }),
  };
}

const tokensCell = (r: Row): string =>
  `${count(r.tokens as number)}${r.start ? ` after ${count(r.start as number)}` : ''}${r.window ? `, window ${r.window}` : ''}`;

/**
 * @param options.cases names of shapes; default the usual ones
 * @throws ERR_LC_CONFIG for a name that there is not
 */
export async function benchAttention(device: DeviceLike, options: { cases?: readonly string[] | undefined } = {}): Promise<Report> {
  const onGpu = device !== 'cpu';
  const all = shapes[onGpu ? 'cuda' : 'cpu'];
  const names = options.cases ?? (onGpu ? usual : Object.keys(all));
  for (const name of names)
    if (!Object.hasOwn(all, name))
      throw new LcError('ERR_LC_CONFIG', `--cases: no case '${name}'; there are ${Object.keys(all).join(', ')}`);
  const report = newReport('attention', device);
  using clock = new Clock(device);
  const copyGbPerSecond = await copyRate(clock, device, onGpu ? 2 ** 30 : 2 ** 22);
  const rows: Row[] = [];
  for (const name of names) rows.push(await measure(clock, device, name, all[name] as Shape, copyGbPerSecond));
  const digits = onGpu ? 0 : 4;
  report.tables.push({
    title: 'Causal attention with sinks; backward with the gradient of the sinks',
    columns: [
      ['heads', text('heads')],
      ['tokens', tokensCell],
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
  const windows = rows.filter((r) => r.window);
  if (windows.length > 0)
    report.tables.push({
      title: `Windows beside streaming q, k, v, out (backward also dout, dq, dk and dv) once at the rate of a copy, ${count(Math.round(copyGbPerSecond))} GB/s in this run`,
      columns: [
        ['heads', text('heads')],
        ['tokens', tokensCell],
        ['forward, ms', fixed('forwardMs', 2)],
        ['stream, ms', fixed('streamForwardMs', 2)],
        ['of it', fixed('forwardOfStream', 2)],
        ['backward, ms', fixed('backwardMs', 2)],
        ['stream, ms', fixed('streamBackwardMs', 2)],
        ['of it', fixed('backwardOfStream', 2)],
      ],
      rows: windows,
    });
  return report;
}
