/** `lc bench rows`: row ops beside a copy, f32, low-rank and grouped products, and copies to and from the host. */
import {
  add,
  axpy,
  copy,
  cublasLt,
  type DeviceLike,
  embeddingGather,
  embeddingScatterAdd,
  empty,
  fill,
  fromTypedArray,
  gemm,
  groupedGemm,
  groupedGemmWeightGrad,
  rmsNorm,
  rmsNormBackward,
  Scope,
  sumRows,
  type Tensor,
} from '@lc/tensor';
import { copyRate, noise } from './bandwidth.js';
import { Clock } from './clock.js';
import { portable } from './gemm.js';
import { narrowProducts } from './narrow.js';
import { count, fixed, newReport, type Report, type Row, text } from './report.js';

function indices(scope: Scope, device: DeviceLike, values: Int32Array): Tensor {
  const ids = scope.own(empty([values.length], { dtype: 'i32', device, label: 'bench' }));
  using host = fromTypedArray(values, [values.length]);
  copy(ids, host);
  return ids;
}

export async function benchRows(device: DeviceLike): Promise<Report> {
  const onGpu = device !== 'cpu';
  const report = newReport('rows', device);
  const [tokens, width, vocab] = onGpu ? [32768, 2880, 201_088] : [512, 720, 2048];
  using scope = new Scope();
  using clock = new Clock(device);
  const x = noise(scope, device, [tokens, width]);
  const y = noise(scope, device, [tokens, width], { seed: 2 });
  const out = noise(scope, device, [tokens, width], { seed: 3 });
  const bytes = x.nbytes;
  const moved: Row[] = [];
  const peer = await copyRate(clock, device, bytes);
  {
    using own = new Scope();
    const w = noise(own, device, [width]);
    const wide = noise(own, device, [tokens, width], { dtype: 'f32' });
    const dWeight = noise(own, device, [width], { dtype: 'f32' });
    const table = noise(own, device, [vocab, width]);
    const dTable = noise(own, device, [vocab, width], { dtype: 'f32' });
    // Token frequencies as in text: a few ids are very common.
    const ids = indices(
      own,
      device,
      Int32Array.from({ length: tokens }, (_, i) => Math.floor(vocab * (((i * 7919) % tokens) / tokens) ** 6)),
    );
    const d = width % 64 === 0 ? 64 : 48;
    const heads = { x: x.view([tokens, width / d, d]), out: out.view([tokens, width / d, d]), weight: w.rows(0, d) };
    const act = bytes / (tokens * width);
    const row = async (name: string, times: number, launch: () => void): Promise<void> => {
      const ms = await clock.time(launch, { times: 5, warm: 3 });
      const rate = (times * bytes) / ms / 1e6;
      moved.push({ name, ms, gbPerSecond: rate, ratio: rate / peer });
    };
    await row('copy', 2, () => copy(out, x));
    await row('cast from f32', 1 + 4 / act, () => copy(out, wide));
    await row('add', 3, () => add({ a: x, b: y, out }));
    await row('axpy', 3, () => axpy({ x, y: out, alpha: 0.5 }));
    await row('rmsNorm', 2, () => rmsNorm({ x, weight: w, out, eps: 1e-5 }));
    await row(`rmsNorm of heads of ${d}`, 2, () => rmsNorm({ ...heads, eps: 1e-5 }));
    await row('rmsNormBackward', 3, () => rmsNormBackward({ x, weight: w, dout: y, dx: out, eps: 1e-5 }));
    await row('rmsNormBackward with dWeight', 3, () => rmsNormBackward({ x, weight: w, dout: y, dx: out, eps: 1e-5, dWeight }));
    await row('sumRows', 1, () => sumRows({ x, out: dWeight }));
    await row('embeddingGather', 2, () => embeddingGather({ table, ids, out }));
    await row('embeddingScatterAdd, many tokens with one id', 1 + 8 / act, () => embeddingScatterAdd({ dout: x, ids, dTable }));
    await row('fill', 1, () => fill(out, 1.5));
  }
  report.tables.push({
    title: `[${count(tokens)}, ${count(width)}] ${report.dtype}, each operand counted once`,
    columns: [
      ['op', text('name')],
      ['ms', fixed('ms', 3)],
      ['GB/s', fixed('gbPerSecond', 0)],
      ['of a copy', fixed('ratio', 2)],
    ],
    rows: moved,
  });
  report.tables.push(await narrowProducts(clock, device, peer));
  report.tables.push(await products(clock, device, { x, tokens, width }));
  return report;
}

interface Operands {
  x: Tensor;
  tokens: number;
  width: number;
}

async function products(clock: Clock, device: DeviceLike, { x, tokens, width }: Operands): Promise<Report['tables'][number]> {
  const onGpu = device !== 'cpu';
  const rows: Row[] = [];
  const product = async (name: string, flop: number, launch: () => void): Promise<void> => {
    const ms = await clock.time(launch, { times: 2, warm: 2 });
    rows.push({ name, ms, tflops: flop / ms / 1e9 });
  };
  using scope = new Scope();
  const m = tokens / 4;
  const [a32, b32, c32] = [
    noise(scope, device, [m, width], { dtype: 'f32' }),
    noise(scope, device, [width, width], { dtype: 'f32' }),
    noise(scope, device, [m, width], { dtype: 'f32' }),
  ] as [Tensor, Tensor, Tensor];
  for (const backend of onGpu && cublasLt() ? ([1, 2] as const) : ([1] as const))
    await product(`f32 ${count(m)} x ${count(width)} x ${count(width)}, ${backend === 1 ? 'lc' : 'cuBLASLt'}`, 2 * m * width * width, () =>
      gemm({ a: a32, b: b32, c: c32, transB: true, backend }),
    );
  const lora = noise(scope, device, [8, width], { dtype: 'f32' });
  const low = noise(scope, device, [tokens, 8]);
  await product('x A^T, rank 8', 2 * tokens * width * 8, () => gemm({ a: x, b: lora, c: low, transB: true }));
  await product('d^T x, rank 8, to f32', 2 * tokens * width * 8, () => gemm({ a: low, b: x, c: lora, transA: true, beta: 1, backend: 1 }));
  const experts = onGpu ? 32 : 4;
  const routed = 2 * tokens;
  const xs = noise(scope, device, [routed, width]);
  const ys = noise(scope, device, [routed, width], { seed: 2 });
  const ws = noise(scope, device, [experts, width, width], { std: 0.02 });
  const dw = noise(scope, device, [experts, width, width]);
  // Uneven, as routers are.
  const share = Array.from({ length: experts }, (_, e) => 1 / (e + 4));
  const total = share.reduce((sum, v) => sum + v, 0);
  const ends = share.map((_, e) => Math.round((routed * share.slice(0, e + 1).reduce((sum, v) => sum + v, 0)) / total));
  const offsets = indices(scope, device, Int32Array.from([0, ...ends]));
  const flop = 2 * routed * width * width;
  const title = `${experts} uneven experts, ${count(routed)} rows`;
  await product(`grouped x W^T, ${title}`, flop, () => groupedGemm({ a: xs, b: ws, c: ys, offsets, transB: true }));
  await product('grouped x W', flop, () => groupedGemm({ a: xs, b: ws, c: ys, offsets }));
  if (onGpu)
    await product('grouped x W^T, portable kernel', flop, () =>
      portable(() => groupedGemm({ a: xs, b: ws, c: ys, offsets, transB: true })),
    );
  await product('grouped weight gradient', flop, () => groupedGemmWeightGrad({ a: ys, b: xs, c: dw, offsets }));
  await product('one dense product of that size, lc', flop, () =>
    gemm({ a: xs, b: ws.view([experts * width, width]).rows(0, width), c: ys, transB: true, backend: 1 }),
  );
  return {
    columns: [
      ['product', text('name')],
      ['ms', fixed('ms', 3)],
      ['TFLOP/s', fixed('tflops', onGpu ? 1 : 4)],
    ],
    rows,
  };
}
