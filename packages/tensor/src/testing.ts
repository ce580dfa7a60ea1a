/**
 * For test suites of packages built on `@lc/tensor`: a leak check, and seeded data. Needs vitest.
 * @module @lc/tensor/testing
 */
import { afterAll, beforeAll, expect } from 'vitest';
import { memory } from './memory.js';

export { randomNormal, seededRandom } from './seeded.js';

const live = (): Record<string, number> => {
  const bytes: Record<string, number> = {};
  for (const [device, counters] of Object.entries(memory().devices)) {
    for (const [label, c] of Object.entries(counters.byLabel)) if (c.liveTensors > 0) bytes[`${device} '${label}'`] = c.liveTensors;
  }
  return bytes;
};

/** Call at the top level of a test file: fails it when it leaves more live tensors than it found. */
export function expectNoLeaks(): void {
  let before: Record<string, number> = {};
  beforeAll(() => {
    before = live();
  });
  afterAll(() => {
    expect(live(), 'tensors that this test file did not dispose (device, label: count)').toEqual(before);
  });
}

/** Largest absolute difference, relative to the largest magnitude of `want` (0 when both are all zero). NaN anywhere gives NaN. */
export function relativeError(got: ArrayLike<number>, want: ArrayLike<number>): number {
  if (got.length !== want.length) throw new Error(`relativeError: lengths ${got.length} and ${want.length}`);
  let worst = 0;
  let largest = 0;
  for (let i = 0; i < want.length; i++) {
    const difference = Math.abs((got[i] as number) - (want[i] as number));
    if (Number.isNaN(difference)) return Number.NaN;
    worst = Math.max(worst, difference);
    largest = Math.max(largest, Math.abs(want[i] as number));
  }
  return largest === 0 ? worst : worst / largest;
}
