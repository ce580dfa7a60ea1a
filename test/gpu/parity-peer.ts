/** Our errors beside those of transformers' own bf16 run (test/gpu/peers/parity_bf16.py), both against the same f32 reference. */
import { readFileSync } from 'node:fs';
import type { RunErrors } from './parity-run.js';

export interface PeerRun extends RunErrors {
  attention: string;
  flipped?: number;
  routed?: number;
}
/** Runs by name: `autocast` is the peer, `plain` the same without autocast, `forced` with the f32 run's routing. */
export type PeerModel = Record<'autocast' | 'plain', PeerRun> & { check?: PeerRun; forced?: PeerRun };
export interface Peer {
  device: string;
  torch: string;
  transformers: string;
  peft: string;
  models: Record<string, PeerModel>;
}

export const readPeer = (file: string): Peer => JSON.parse(readFileSync(file, 'utf8')) as Peer;

export const median = (values: readonly number[]): number => [...values].sort((a, b) => a - b)[values.length >> 1] as number;
export const worst = (values: readonly number[]): number => Math.max(...values);

/** At most this many times the peer's error. */
export const ALLOWED = 2;

/** Ours over theirs. */
export interface Comparison {
  gradients: { median: number; worst: number };
  losses: { median: number; worst: number };
  /** Gradients with more than `ALLOWED` times the error of the same one of theirs, and losses likewise. */
  gradientsBeyond: number;
  lossesBeyond: number;
  /**
   * Every gradient, and median and worst of the ten losses, within `ALLOWED`. A single loss is one draw of rounding on either side, of either sign: where
   * theirs happens to be close, any ratio can come out (transformers' two bf16 runs exceed twice one another in more than a quarter of the single losses), so
   * those are counted and printed, not asserted.
   */
  pass: boolean;
}

/** @throws Error where the two are not of the same parameters */
export function compare(ours: RunErrors, theirs: RunErrors): Comparison {
  const names = Object.keys(theirs.gradients);
  if (names.length !== Object.keys(ours.gradients).length || names.some((name) => !(name in ours.gradients)))
    throw new Error("the peer's gradients are of other parameters");
  const [mine, its] = [names.map((n) => ours.gradients[n] as number), names.map((n) => theirs.gradients[n] as number)];
  const ratios = (a: readonly number[], b: readonly number[]) => ({ median: median(a) / median(b), worst: worst(a) / worst(b) });
  const beyond = (a: readonly number[], b: readonly number[]): number => a.filter((v, i) => !(v <= ALLOWED * (b[i] as number))).length;
  const [gradients, losses] = [ratios(mine, its), ratios(ours.losses, theirs.losses)];
  const gradientsBeyond = beyond(mine, its);
  const within = [gradients.median, gradients.worst, losses.median, losses.worst].every((ratio) => ratio <= ALLOWED);
  return { gradients, losses, gradientsBeyond, lossesBeyond: beyond(ours.losses, theirs.losses), pass: within && gradientsBeyond === 0 };
}
