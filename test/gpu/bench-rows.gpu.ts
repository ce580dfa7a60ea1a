/** Row ops on [32,768, 2,880] bf16, f32 and grouped GEMM, copies: each beside what bounds it in the same run. */
import {
  add,
  axpy,
  copy,
  defaultStream,
  devices,
  Event,
  embeddingGather,
  embeddingScatterAdd,
  empty,
  fill,
  fromTypedArray,
  gemm,
  groupedGemm,
  groupedGemmWeightGrad,
  isPinned,
  rmsNorm,
  rmsNormBackward,
  sumRows,
  type Tensor,
  zeros,
} from '@lc/tensor';
import { random } from './bench-gemm.gpu.js';

/** Median milliseconds of `fn` on the device. */
async function time(fn: () => void, times = 5): Promise<number> {
  using start = new Event('cuda', { timing: true });
  using end = new Event('cuda', { timing: true });
  const stream = defaultStream('cuda');
  for (let i = 0; i < 3; i++) fn();
  const all: number[] = [];
  for (let round = 0; round < 7; round++) {
    start.record(stream);
    for (let i = 0; i < times; i++) fn();
    end.record(stream);
    await end.sync();
    all.push(end.elapsedSince(start) / times);
  }
  return all.sort((a, b) => a - b)[3] as number;
}

function indices(values: Int32Array): Tensor {
  const ids = empty([values.length], { dtype: 'i32', device: 'cuda' });
  using host = fromTypedArray(values, [values.length]);
  copy(ids, host);
  return ids;
}

export async function benchRows(): Promise<void> {
  const [tokens, width, vocab] = [32768, 2880, 201_088];
  console.log(devices().find((d) => d.device === 'cuda:0')?.name);
  const bytes = tokens * width * 2;
  using x = random([tokens, width]);
  using y = random([tokens, width]);
  using out = random([tokens, width]);
  using weight = random([1, width]);
  const w = weight.view([width]);
  using wide = empty([tokens, width], { device: 'cuda' });
  copy(wide, x);
  using dWeight = zeros([width], { device: 'cuda' });
  using table = random([vocab, width]);
  using dTable = zeros([vocab, width], { device: 'cuda' });
  // Token frequencies as in text: a few ids are very common.
  using ids = indices(Int32Array.from({ length: tokens }, () => Math.floor(vocab * Math.random() ** 6)));
  console.log('| op | ms | GB/s |\n|---|---|---|');
  const row = async (name: string, moved: number, fn: () => void): Promise<void> => {
    const ms = await time(fn);
    console.log(`| ${name} | ${ms.toFixed(3)} | ${(moved / ms / 1e6).toFixed(0)} |`);
  };
  await row('copy, device to device', 2 * bytes, () => copy(out, x));
  await row('cast f32 -> bf16', 3 * bytes, () => copy(out, wide));
  await row('add', 3 * bytes, () => add({ a: x, b: y, out }));
  await row('axpy', 3 * bytes, () => axpy({ x, y: out, alpha: 0.5 }));
  await row('rmsNorm', 2 * bytes, () => rmsNorm({ x, weight: w, out, eps: 1e-5 }));
  await row('rmsNormBackward', 3 * bytes, () => rmsNormBackward({ x, weight: w, dout: y, dx: out, eps: 1e-5 }));
  await row('rmsNormBackward with dWeight', 3 * bytes, () => rmsNormBackward({ x, weight: w, dout: y, dx: out, eps: 1e-5, dWeight }));
  const heads = x.view([tokens, 45, 64]);
  const headsOut = out.view([tokens, 45, 64]);
  await row('rmsNorm of heads of 64', 2 * bytes, () => rmsNorm({ x: heads, weight: w.rows(0, 64), out: headsOut, eps: 1e-5 }));
  await row('sumRows', bytes, () => sumRows({ x, out: dWeight }));
  await row('embeddingGather', 2 * bytes, () => embeddingGather({ table, ids, out }));
  await row('embeddingScatterAdd', 5 * bytes, () => embeddingScatterAdd({ dout: x, ids, dTable }));
  await row('fill', bytes, () => fill(out, 1.5));

  console.log('| GEMM | ms | TFLOP/s |\n|---|---|---|');
  const product = async (name: string, flop: number, fn: () => void): Promise<void> => {
    const ms = await time(fn, 2);
    console.log(`| ${name} | ${ms.toFixed(3)} | ${(flop / ms / 1e9).toFixed(1)} |`);
  };
  using a32 = empty([8192, width], { device: 'cuda' });
  using b32 = empty([width, width], { device: 'cuda' });
  using c32 = empty([8192, width], { device: 'cuda' });
  copy(a32, x.rows(0, 8192));
  copy(b32, y.rows(0, width));
  for (const backend of [1, 2] as const) {
    const name = `f32 8,192 x 2,880 x 2,880, ${backend === 1 ? 'own' : 'cuBLASLt'}`;
    await product(name, 2 * 8192 * width * width, () => gemm({ a: a32, b: b32, c: c32, transB: true, backend }));
  }
  using lora = empty([8, width], { device: 'cuda' });
  copy(lora, y.rows(0, 8));
  using low = random([tokens, 8]);
  await product('x A^T, rank 8: bf16 x f32', 2 * tokens * width * 8, () => gemm({ a: x, b: lora, c: low, transB: true }));
  await product('dA = d^T x, rank 8: bf16 x bf16 -> f32', 2 * tokens * width * 8, () =>
    gemm({ a: low, b: x, c: lora, transA: true, beta: 1, backend: 1 }),
  );
  const [experts, rows, n] = [32, 65536, 2880];
  using xs = random([rows, width]);
  using ys = random([rows, n]);
  using flat = random([experts * n, width]);
  const ws = flat.view([experts, n, width]);
  using dw = empty([experts, n, width], { dtype: 'bf16', device: 'cuda' });
  // Uneven, as routers are.
  const share = Array.from({ length: experts }, (_, e) => 1 / (e + 4));
  const total = share.reduce((s, v) => s + v, 0);
  const ends = share.map((_, e) => Math.round((rows * share.slice(0, e + 1).reduce((s, v) => s + v, 0)) / total));
  using offsets = indices(Int32Array.from([0, ...ends]));
  const flop = 2 * rows * width * n;
  await product('grouped, 32 experts, 65,536 rows, x W^T', flop, () => groupedGemm({ a: xs, b: ws, c: ys, offsets, transB: true }));
  await product('grouped, x W', flop, () => groupedGemm({ a: xs, b: ws, c: ys, offsets }));
  await product('grouped weight gradient', flop, () => groupedGemmWeightGrad({ a: ys, b: xs, c: dw, offsets }));
  await product('the same in one dense product, own', flop, () =>
    gemm({ a: xs, b: ws.view([experts * n, width]).rows(0, n), c: ys, transB: true, backend: 1 }),
  );

  for (let round = 0; round < 2; round++) {
    const from = performance.now();
    using host = empty([1 << 30], { dtype: 'u8', device: 'host' });
    const pinned = (performance.now() - from) / 1000;
    using device = empty([1 << 30], { dtype: 'u8', device: 'cuda' });
    using pageable = empty([1 << 30], { dtype: 'u8' });
    pageable.data().fill(1);
    const speed = async (fn: () => void): Promise<string> => ((1 << 30) / (await time(fn, 1)) / 1e6).toFixed(1);
    console.log(
      `pinning 1 GiB: ${pinned.toFixed(3)} s (${isPinned(host)}); to the device ${await speed(() => copy(device, host))} GB/s, back ${await speed(() => copy(host, device))}; pageable ${await speed(() => copy(device, pageable))} and ${await speed(() => copy(pageable, device))}`,
    );
  }
}
