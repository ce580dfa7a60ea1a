/**
 * Reference models on the GPU in bf16, against transformers' f32 numbers: relative Frobenius error of each LoRA gradient, deviation of each loss of the
 * ten-step curve. Activations are bf16 here and f32 there, so this shows bf16's noise, not equality; how much of it is due, transformers' own bf16 run says
 * (`--peer`, a file of peers/parity_bf16.py).
 */
import { writeFileSync } from 'node:fs';
import { ALLOWED, compare, median, readPeer, worst } from './parity-peer.js';
import { conditionOf, type Run, runReference } from './parity-run.js';
import { flipped } from './routing.js';

const e = (v: number): string => v.toExponential(1);

export interface ParityOptions {
  /** Of peers/parity_bf16.py: its errors are printed beside ours, and ours may be at most twice as large. */
  peer?: string | undefined;
  /** Ours, in the same form. */
  out?: string | undefined;
  /** Print how much each model magnifies noise (see `conditionOf`), and the error per unit of it. */
  condition?: boolean | undefined;
}

interface Ours {
  bf16: Run;
  /** Mixture-of-experts models: with the experts that our f32 run on the CPU chose. */
  forced: Run | null;
  flips: { flipped: number; routed: number } | null;
}

async function measure(name: string): Promise<Ours> {
  const { readReference } = await import('../parity/reference.js');
  const reference = await readReference(name);
  const bf16 = await runReference(reference, 'cuda:0');
  if (bf16.tiles.length === 0) return { bf16, forced: null, flips: null };
  const f32 = await runReference(reference, 'cpu');
  const forced = await runReference(reference, 'cuda:0', f32.tiles);
  return { bf16, forced, flips: flipped(bf16.gradientTiles, f32.gradientTiles) };
}

/** @param folder reference models, as test/fixtures/reference-models/README.md describes them */
export async function gpuParity(folder: string, options: ParityOptions = {}): Promise<boolean> {
  process.env.LCTX_REFERENCE_MODELS = folder;
  const { referenceModels } = await import('../parity/reference.js');
  const peer = options.peer ? readPeer(options.peer) : null;
  const all = new Map<string, Ours>();
  let fine = referenceModels.length > 0;
  console.log(
    '| model | base loss | adapter loss | gradients: median | worst | ten losses: median | worst | same bits twice | routings flipped |\n|---|---|---|---|---|---|---|---|---|',
  );
  for (const name of referenceModels) {
    const ours = await measure(name);
    all.set(name, ours);
    const { bf16, forced, flips } = ours;
    const row = (label: string, run: Run, last: string): void => {
      const gradients = Object.values(run.gradients);
      console.log(
        `| ${label} | ${e(run.baseLoss)} | ${e(run.adapterLoss)} | ${e(median(gradients))} | ${e(worst(gradients))} | ${e(median(run.losses))} | ${e(worst(run.losses))} | ${run.sameBits ? 'yes' : 'NO'} | ${last} |`,
      );
    };
    row(name, bf16, flips ? `${flips.flipped} of ${flips.routed}` : '');
    if (forced) row(`${name}, f32's routing`, forced, 'none');
    for (const run of forced ? [bf16, forced] : [bf16]) fine &&= run.sameBits && Object.values(run.gradients).every(Number.isFinite);
  }
  if (options.condition) {
    const { readReference } = await import('../parity/reference.js');
    console.log(
      `\n| model | magnifies noise on the embedding by | median gradient error / that, f32's routing where there are experts |\n|---|---|---|`,
    );
    for (const [name, { bf16, forced }] of all) {
      const condition = await conditionOf(await readReference(name));
      console.log(`| ${name} | ${condition.toFixed(1)} | ${e(median(Object.values((forced ?? bf16).gradients)) / condition)} |`);
    }
  }
  if (options.out)
    writeFileSync(options.out, `${JSON.stringify(Object.fromEntries(all), (key, value) => (/iles$/.test(key) ? undefined : value), 1)}\n`);
  if (!peer) return fine;

  console.log(
    `\nBeside transformers ${peer.transformers}, PEFT ${peer.peft}, PyTorch ${peer.torch} on ${peer.device}: ours / theirs (ratio)\n| model | gradients: median | worst | single ones beyond ${ALLOWED} x | ten losses: median | worst | single ones beyond ${ALLOWED} x | |\n|---|---|---|---|---|---|---|---|`,
  );
  const among = { beyond: 0, of: 0 };
  for (const [name, { bf16, forced }] of all) {
    const theirs = peer.models[name];
    if (!theirs) throw new Error(`the peer's file has no ${name}`);
    const row = (label: string, mine: Run, its: typeof theirs.autocast): void => {
      const c = compare(mine, its);
      const pair = (a: readonly number[], b: readonly number[], of: typeof worst): string =>
        `${e(of(a))} / ${e(of(b))} (${(of(a) / of(b)).toFixed(2)})`;
      const [g, h] = [Object.values(mine.gradients), Object.values(its.gradients)];
      console.log(
        `| ${label} | ${pair(g, h, median)} | ${pair(g, h, worst)} | ${c.gradientsBeyond} of ${h.length} | ${pair(mine.losses, its.losses, median)} | ${pair(mine.losses, its.losses, worst)} | ${c.lossesBeyond} of ${mine.losses.length} | ${c.pass ? 'PASS' : 'FAIL'} |`,
      );
      fine &&= c.pass;
    };
    row(name, bf16, theirs.autocast);
    if (forced && theirs.forced) row(`${name}, f32's routing`, forced, theirs.forced);
    among.beyond += compare(theirs.plain, theirs.autocast).lossesBeyond;
    among.of += theirs.autocast.losses.length;
  }
  console.log(
    `Their two bf16 runs against each other (without autocast / with it): ${among.beyond} of ${among.of} single losses beyond ${ALLOWED} x: one loss is one draw`,
  );
  return fine;
}
