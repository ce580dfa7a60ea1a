/** A test runner of forty lines: the bundle runs where there is no npm. */
type Test = { name: string; fn: () => void | Promise<void> };
const tests: Test[] = [];
let large = 0;

/**
 * `LCTX_TEST_SMALL=1`: what takes gigabytes or minutes is left out, and long lists of cases are thinned; every kernel is still launched. For tools that slow
 * each launch down (`sanitize.sh`).
 */
export const small = process.env.LCTX_TEST_SMALL === '1';

export function test(name: string, fn: () => void | Promise<void>): void {
  tests.push({ name, fn });
}

/** A test that a small run leaves out. */
export function largeTest(name: string, fn: () => void | Promise<void>): void {
  if (small) large++;
  else test(name, fn);
}

/** `cases`; in a small run every `step`th of them, the first included. */
export function thin<T>(cases: readonly T[], step: number): readonly T[] {
  return small ? cases.filter((_, i) => i % step === 0) : cases;
}

export function assert(condition: boolean, message: string): asserts condition {
  if (!condition) throw new Error(message);
}

/** `LCTX_TEST_SHARD=2/4`: only the second of every four tests, so that several processes can share them. */
function shard(): (i: number) => boolean {
  const [, mine, of] = /^(\d+)\/(\d+)$/.exec(process.env.LCTX_TEST_SHARD ?? '1/1') ?? [];
  if (!(Number(mine) >= 1 && Number(mine) <= Number(of)))
    throw new Error(`LCTX_TEST_SHARD must be like 2/4, got ${process.env.LCTX_TEST_SHARD}`);
  return (i) => i % Number(of) === Number(mine) - 1;
}

/** Runs all tests whose name contains `filter`; prints one line each, and the sum last. */
export async function runTests(filter = ''): Promise<boolean> {
  let passed = 0;
  let failed = 0;
  const mine = shard();
  for (const { name, fn } of tests.filter((t) => t.name.includes(filter)).filter((_, i) => mine(i))) {
    const start = performance.now();
    try {
      await fn();
      passed++;
      console.log(`ok   ${name} (${Math.round(performance.now() - start)} ms)`);
    } catch (error) {
      failed++;
      console.log(`FAIL ${name}: ${(error as Error).stack ?? String(error)}`);
    }
  }
  if (large) console.log(`LCTX_TEST_SMALL: ${large} large tests left out`);
  console.log(`${passed} passed, ${failed} failed`);
  return failed === 0;
}
