/** The longest sequence that fits a case: bisection over plans, which take no memory; then the candidate is reserved for all layers and two of them are executed. */
import type { CausalLM } from '@lc/models';
import { applyCaps } from './memory-caps.js';
import type { StepCase } from './step-case.js';
import { fits, runStep, type StepIo, type StepResult } from './step-run.js';

export interface SearchResult {
  /** The longest that was executed; 0: none. */
  maxTokens: number;
  /** The longest that a plan promises; longer than `maxTokens` where the search was told to stop there. */
  plannedTokens: number;
  /** Of the length that was executed. */
  probe: StepResult | null;
  /** Lengths that a plan promised and the memory did not hold. */
  refused: number[];
}

export interface SearchOptions {
  /** Execute nothing longer than this: attention's time grows with the square of the length. */
  most?: number | undefined;
  /** Told what is about to be reserved and executed. */
  tell?: (tokens: number) => void;
}

/** Lengths are whole multiples of this; smaller ones of 1. */
const STEP = 256;
const HIGHEST = 2 ** 31;

/** @param above the search begins there */
export function longestPlanned(model: CausalLM, c: Omit<StepCase, 'tokens'>, above = STEP): number {
  const ok = (tokens: number): boolean => fits(model, { ...c, tokens });
  const unit = ok(STEP) ? STEP : 1;
  if (unit === 1 && !ok(1)) return 0;
  let low = ok(above) ? Math.max(1, Math.floor(above / unit)) : 1;
  let high = low * 2;
  while (high * unit < HIGHEST && ok(high * unit)) {
    low = high;
    high *= 2;
  }
  while (high - low > 1 + (low >> 9)) {
    const middle = (low + high) >>> 1;
    if (ok(middle * unit)) low = middle;
    else high = middle;
  }
  return low * unit;
}

/** A length that turns out not to fit gives way to one 2% shorter, eight times at most. */
export async function search(model: CausalLM, c: Omit<StepCase, 'tokens'>, io: StepIo, options: SearchOptions = {}): Promise<SearchResult> {
  const { most = HIGHEST, tell } = options;
  const refused: number[] = [];
  applyCaps(model.device, c);
  const plannedTokens = longestPlanned(model, c);
  let tokens = Math.min(plannedTokens, most);
  for (let attempt = 0; tokens > 0 && attempt < 9; attempt++) {
    tell?.(tokens);
    const probe = await runStep(model, { ...c, tokens, probe: true }, io);
    if (probe.fits) return { maxTokens: tokens, plannedTokens, probe, refused };
    refused.push(tokens);
    tokens = Math.floor((tokens * 0.98) / STEP) * STEP || tokens - 1;
  }
  return { maxTokens: 0, plannedTokens, probe: null, refused };
}
