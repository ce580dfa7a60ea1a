/** Products with one narrow side, as LoRA and a router have them: what bounds them is their wide operand, so they stand beside a copy. */
import { type DeviceLike, gemm, Scope } from '@lc/tensor';
import { noise } from './bandwidth.js';
import type { Clock } from './clock.js';
import { count, fixed, type Report, type Row, text } from './report.js';

/** `peer`: GB/s of a copy in the same run. */
export async function narrowProducts(clock: Clock, device: DeviceLike, peer: number): Promise<Report['tables'][number]> {
  const rows: Row[] = [];
  const [tokens, wide, router] = device === 'cpu' ? [256, 320, 128] : [8192, 4096, 2048];
  const width = device === 'cpu' ? 192 : 2880;
  const run = async (name: string, m: number, k: number, r: number): Promise<void> => {
    using scope = new Scope();
    const x = noise(scope, device, [m, k]);
    const y = noise(scope, device, [m, k], { seed: 2 });
    const low = noise(scope, device, [m, r], { dtype: 'f32' });
    const a = noise(scope, device, [r, k], { dtype: 'f32', std: 0.02 });
    const b = noise(scope, device, [k, r], { dtype: 'f32', std: 0.02 });
    const add = async (what: string, bytes: number, launch: () => void): Promise<void> => {
      const ms = await clock.time(launch, { times: 8, warm: 3 });
      rows.push({ name: `${what}, ${name}`, ms, ratio: bytes / ms / 1e6 / peer });
    };
    const small = low.nbytes + a.nbytes;
    await add('x A^T', x.nbytes + small, () => gemm({ a: x, b: a, c: low, transB: true }));
    await add('d B', x.nbytes + small, () => gemm({ a: x, b, c: low }));
    await add('y += h B^T', 2 * y.nbytes + small, () => gemm({ a: low, b, c: y, transB: true, alpha: 1e-4, beta: 1 }));
    await add('dx += d A', 2 * y.nbytes + small, () => gemm({ a: low, b: a, c: y, alpha: 1e-4, beta: 1 }));
    await add('dB += x^T d', x.nbytes + small, () => gemm({ a: x, b: low, c: b, transA: true, alpha: 1e-4, beta: 1 }));
    await add('dA += d^T x', x.nbytes + small, () => gemm({ a: low, b: x, c: a, transA: true, alpha: 1e-4, beta: 1 }));
  };
  await run(`${count(tokens)} x ${count(width)}, rank 8`, tokens, width, 8);
  await run(`${count(tokens)} x ${count(wide)}, rank 8`, tokens, wide, 8);
  await run(`${count(tokens)} x ${count(width)}, rank 64`, tokens, width, 64);
  await run(`${count(router)} x ${count(width)}, rank 32`, router, width, 32);
  return {
    title: 'one narrow side, f32 parameters; wide operands counted once, twice where they are added to',
    columns: [
      ['product', text('name')],
      ['ms', fixed('ms', 3)],
      ['of a copy', fixed('ratio', 2)],
    ],
    rows,
  };
}
