/** The last line of `npm test` counts whatever failed, inside a test or outside. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { summary, tallyReport } from '../../scripts/tally.mjs';

let dir: string;
beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), 'lc-tally-'));
});
afterAll(() => rmSync(dir, { recursive: true, force: true }));

const suite = (states: string[], status = states.includes('failed') ? 'failed' : 'passed', message = '') => ({
  name: 'a.test.ts',
  status,
  message,
  assertionResults: states.map((s) => ({ status: s })),
});
const tally = (content: unknown, exitCode: number) => {
  const file = join(dir, 'report.json');
  writeFileSync(file, typeof content === 'string' ? content : JSON.stringify({ testResults: content }));
  return tallyReport('pkg', file, exitCode);
};

it('sums states', () => {
  const result = tally([suite(['passed', 'pending', 'passed']), suite(['todo', 'skipped', 'passed'])], 0);
  expect(summary(result)).toBe('3 passed, 0 failed, 3 skipped');
  expect(result.problems).toEqual([]);
});
it('counts failed tests', () => {
  expect(tally([suite(['passed', 'failed', 'failed'])], 1)).toEqual({ passed: 1, failed: 2, skipped: 0, problems: ['pkg: 2 tests'] });
});
it('counts a file that does not load, beside failed tests too', () => {
  const result = tally([suite(['failed']), suite([], 'failed', 'SyntaxError: no\nstack')], 1);
  expect(result.failed).toBe(2);
  expect(result.problems.join()).toContain('SyntaxError: no');
});
it.each([
  ['a missing report', undefined, 139, /no report \(exit code 139\)/],
  ['a broken report', '{"testRes', 0, /unreadable report/],
  ['a crash after the last test', [suite(['passed'])], 1, /exit code 1, though no test failed/],
  ['a package without tests', [], 0, /no tests/],
])('counts %s', (_, content, exitCode, problem) => {
  const result = content === undefined ? tallyReport('pkg', join(dir, 'none.json'), exitCode) : tally(content, exitCode);
  expect(result.failed).toBe(1);
  expect(result.problems.join()).toMatch(problem);
});
