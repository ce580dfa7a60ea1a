/** `lc bench gemm`: x W^T on gpt-oss shapes, lc's own kernels (best and portable) beside cuBLASLt where it is found, in one run on random data. */
import { cublasLt, type DeviceLike, gemm, Scope, type Tensor } from '@lc/tensor';
import { noise } from './bandwidth.js';
import { Clock, median } from './clock.js';
import { chooseKernels } from './kernels.js';
import { fixed, newReport, type Report, type Row, text } from './report.js';

const shapes = {
  cuda: [
    [32768, 2880, 4096],
    [32768, 4096, 2880],
    [32768, 5760, 2880],
    [8192, 201088, 2880],
    [8192, 8192, 8192],
  ],
  cpu: [
    [512, 720, 1024],
    [512, 1024, 720],
  ],
} as const;

/** Launches with the portable kernel alone, as on a card that has no other. */
export function portable(launch: () => void): void {
  using _ = chooseKernels({ LCTX_GEMM: 'portable' });
  launch();
}

/** The backends take turns in rounds of about `flopPerRound`, so that clocks and heat are the same for both; `best` is the fastest of three short rounds from a cool start. */
async function measure(
  clock: Clock,
  launches: readonly (() => void)[],
  flop: number,
  flopPerRound: number,
): Promise<{ median: number; best: number }[]> {
  const rate = (ms: number): number => flop / ms / 1e9;
  const best: number[] = [];
  for (const launch of launches) {
    let most = 0;
    for (let i = 0; i < 3; i++) most = Math.max(most, rate(await clock.time(launch, { times: 10, rounds: 1, warm: i === 0 ? 5 : 0 })));
    best.push(most);
  }
  const all = launches.map((): number[] => []);
  const times = Math.max(1, Math.ceil(flopPerRound / flop));
  for (let i = 0; i < 5; i++)
    for (const [at, launch] of launches.entries())
      (all[at] as number[]).push(rate(await clock.time(launch, { times, rounds: 1, warm: 0 })));
  return all.map((list, at) => ({ median: median(list), best: best[at] as number }));
}

export async function benchGemm(device: DeviceLike): Promise<Report> {
  const onGpu = device !== 'cpu';
  const report = newReport('gemm', device);
  const peer = onGpu && cublasLt() !== null;
  const rows: Row[] = [];
  using clock = new Clock(device);
  for (const [m, n, k] of shapes[onGpu ? 'cuda' : 'cpu']) {
    using scope = new Scope();
    const [a, b, c] = [
      noise(scope, device, [m, k]),
      noise(scope, device, [n, k], { seed: 2 }),
      noise(scope, device, [m, n], { seed: 3 }),
    ] as [Tensor, Tensor, Tensor];
    const launches = [() => gemm({ a, b, c, transB: true, backend: 1 })];
    if (onGpu) launches.push(() => portable(() => gemm({ a, b, c, transB: true, backend: 1 })));
    if (peer) launches.push(() => gemm({ a, b, c, transB: true, backend: 2 }));
    const [ours, lesser, theirs] = await measure(clock, launches, 2 * m * n * k, onGpu ? 2e14 : 1e8);
    if (!ours) continue;
    rows.push({
      ...{ shape: `${m} x ${n} x ${k}`, ms: (2 * m * n * k) / ours.median / 1e9, tflops: ours.median, bestTflops: ours.best },
      ...(lesser ? { portableTflops: lesser.median } : {}),
      ...(lesser && theirs ? { portableRatio: lesser.median / theirs.median } : {}),
      ...(theirs
        ? { peerTflops: theirs.median, ratio: ours.median / theirs.median, peerBestTflops: theirs.best, bestRatio: ours.best / theirs.best }
        : {}),
    });
  }
  const digits = onGpu ? 0 : 3;
  report.tables.push({
    columns: [
      ['m x n x k', text('shape')],
      ['ms', fixed('ms', 3)],
      ['lc, TFLOP/s', fixed('tflops', digits)],
      ['cuBLASLt', fixed('peerTflops', 0)],
      ['ratio', fixed('ratio', 2)],
      ['portable kernel', fixed('portableTflops', 0)],
      ['ratio', fixed('portableRatio', 2)],
      ['short rounds: lc', fixed('bestTflops', digits)],
      ['cuBLASLt', fixed('peerBestTflops', 0)],
      ['ratio', fixed('bestRatio', 2)],
    ],
    rows,
  });
  return report;
}
