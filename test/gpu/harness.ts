/** A test runner of thirty lines: the bundle runs where there is no npm. */
type Test = { name: string; fn: () => void | Promise<void> };
const tests: Test[] = [];

export function test(name: string, fn: () => void | Promise<void>): void {
  tests.push({ name, fn });
}

export function assert(condition: boolean, message: string): asserts condition {
  if (!condition) throw new Error(message);
}

/** Runs all tests whose name contains `filter`; prints one line each, and the sum last. */
export async function runTests(filter = ''): Promise<boolean> {
  let passed = 0;
  let failed = 0;
  for (const { name, fn } of tests.filter((t) => t.name.includes(filter))) {
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
  console.log(`${passed} passed, ${failed} failed`);
  return failed === 0;
}
