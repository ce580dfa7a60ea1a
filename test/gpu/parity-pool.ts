/**
 * Many inputs of each model together. One run's ten losses are ten draws of rounding noise, correlated and of either sign, so the ratio of two medians of ten says little; with
 * eight seeds there are eight draws of each of the ten, and a typical size (root mean square) of each that can be compared.
 */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { ALLOWED, median, type Peer, type PeerRun, readPeer, worst } from './parity-peer.js';
import type { RunErrors } from './parity-run.js';

type Ours = Record<string, { bf16: RunErrors; forced: RunErrors | null }>;

/** The same inputs, run three times: by us, by the peer, and by the peer in its other way (none with forced routing). */
export interface Sample {
  ours: RunErrors;
  theirs: RunErrors;
  other: RunErrors | null;
}

export const rms = (values: readonly number[]): number => Math.sqrt(values.reduce((sum, v) => sum + v * v, 0) / values.length);

/** One comparison of two runs' losses over all inputs: `a` over `b`. */
export interface Ratios {
  median: number;
  rms: number;
  worst: number;
  /** Of each step's root mean square over the inputs. */
  steps: number[];
  /** Single losses with more than `ALLOWED` times the other's deviation. */
  beyond: number;
}

export function ratios(a: readonly RunErrors[], b: readonly RunErrors[]): Ratios {
  const [x, y] = [a.flatMap((r) => r.losses), b.flatMap((r) => r.losses)];
  const step = (of: readonly RunErrors[], k: number): number => rms(of.map((r) => r.losses[k] as number));
  return {
    median: median(x) / median(y),
    rms: rms(x) / rms(y),
    worst: worst(x) / worst(y),
    steps: (a[0] as RunErrors).losses.map((_, k) => step(a, k) / step(b, k)),
    beyond: x.filter((v, i) => !(v <= ALLOWED * (y[i] as number))).length,
  };
}

/** Of gradients: medians and the largest over all inputs, and the largest ratio of one gradient of one input. */
export function gradientRatios(samples: readonly Sample[]): { median: number; worst: number; single: number; count: number } {
  const pairs = samples.flatMap(({ ours, theirs }) =>
    Object.entries(theirs.gradients).map(([name, its]) => [ours.gradients[name] as number, its] as const),
  );
  const [a, b] = [pairs.map((p) => p[0]), pairs.map((p) => p[1])];
  return { median: median(a) / median(b), worst: worst(a) / worst(b), single: worst(pairs.map(([x, y]) => x / y)), count: pairs.length };
}

/** Samples by model, `MODEL.sK` counted as MODEL; models with experts also with the f32 run's routing. */
export function samplesOf(ours: Ours, peer: Peer): Map<string, Sample[]> {
  const all = new Map<string, Sample[]>();
  const put = (label: string, sample: Sample): void => {
    all.set(label, [...(all.get(label) ?? []), sample]);
  };
  for (const [name, { bf16, forced }] of Object.entries(ours)) {
    const theirs = peer.models[name];
    if (!theirs) throw new Error(`the peer's file has no ${name}`);
    const model = name.replace(/\.s\d+$/, '');
    put(model, { ours: bf16, theirs: theirs.autocast, other: theirs.plain });
    if (forced && theirs.forced) put(`${model}, f32's routing`, { ours: forced, theirs: theirs.forced as PeerRun, other: null });
  }
  return all;
}

/**
 * @param folder with pairs of files, `ours.X.json` (`parity --out`) and `theirs.X.json` (peers/parity_bf16.py)
 * @returns whether every gradient, and median, root mean square and worst of each model's losses, is within `ALLOWED` times the peer's
 */
export function poolParity(folder: string): boolean {
  const pooled = new Map<string, Sample[]>();
  for (const file of readdirSync(folder).filter((name) => /^ours\..*\.json$/.test(name))) {
    const ours = JSON.parse(readFileSync(join(folder, file), 'utf8')) as Ours;
    for (const [label, samples] of samplesOf(ours, readPeer(join(folder, file.replace(/^ours/, 'theirs')))))
      pooled.set(label, [...(pooled.get(label) ?? []), ...samples]);
  }
  const r = (v: number): string => v.toFixed(2);
  console.log(
    `Ours / theirs (in brackets: theirs without autocast / theirs). Beyond: more than ${ALLOWED} x\n` +
      '| model | inputs | gradients: median | worst | largest single | losses: median | root mean square | worst | of ten steps, rms over inputs: largest | beyond | single losses beyond | |\n' +
      '|---|---|---|---|---|---|---|---|---|---|---|---|',
  );
  let fine = pooled.size > 0;
  const sum = { steps: 0, stepsOther: 0, of: 0, single: 0, singleOther: 0, ofSingle: 0, log: 0, logOther: 0, others: 0 };
  for (const [label, samples] of [...pooled].sort(([a], [b]) => (a < b ? -1 : 1))) {
    const g = gradientRatios(samples);
    const mine = ratios(
      samples.map((s) => s.ours),
      samples.map((s) => s.theirs),
    );
    const withOther = samples.filter((s) => s.other);
    const its =
      withOther.length > 0
        ? ratios(
            withOther.map((s) => s.other as RunErrors),
            withOther.map((s) => s.theirs),
          )
        : null;
    const beyondOf = (of: Ratios): number => of.steps.filter((v) => v > ALLOWED).length;
    const beside = (value: string, other: string | null): string => (other === null ? value : `${value} (${other})`);
    const both = (pick: (of: Ratios) => number, print: (v: number) => string = r): string =>
      beside(print(pick(mine)), its ? print(pick(its)) : null);
    const pass = [g.median, g.worst, g.single, mine.median, mine.rms, mine.worst].every((v) => v <= ALLOWED);
    console.log(
      `| ${label} | ${samples.length} | ${r(g.median)} | ${r(g.worst)} | ${r(g.single)} of ${g.count} | ${both((v) => v.median)} | ${both((v) => v.rms)} | ${both((v) => v.worst)} | ` +
        `${both((v) => worst(v.steps))} | ${both(beyondOf, String)} of ${mine.steps.length} | ${both((v) => v.beyond, String)} of ${samples.length * mine.steps.length} | ${pass ? 'PASS' : 'FAIL'} |`,
    );
    fine &&= pass;
    if (!its) continue;
    sum.steps += beyondOf(mine);
    sum.stepsOther += beyondOf(its);
    sum.of += mine.steps.length;
    sum.single += mine.beyond;
    sum.singleOther += its.beyond;
    sum.ofSingle += samples.length * mine.steps.length;
    sum.log += Math.log(mine.rms);
    sum.logOther += Math.log(its.rms);
    sum.others++;
  }
  console.log(
    `All models: steps beyond ${sum.steps} (${sum.stepsOther}) of ${sum.of}; single losses beyond ${sum.single} (${sum.singleOther}) of ${sum.ofSingle}; ` +
      `root mean square, geometric mean over models ${r(Math.exp(sum.log / sum.others))} (${r(Math.exp(sum.logOther / sum.others))})`,
  );
  return fine;
}
