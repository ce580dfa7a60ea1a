// Sums vitest's JSON reports. What failed outside a test (a file that does not load, a crash, a missing report) counts as a failure of its own, so that
// nothing can fail and still add up to "0 failed".
import { existsSync, readFileSync } from 'node:fs';

/** Counts of one package from its report file and its exit code. */
export function tallyReport(name, file, exitCode) {
  const none = { passed: 0, failed: 1, skipped: 0 };
  if (!existsSync(file)) return { ...none, problems: [`${name}: no report (exit code ${exitCode})`] };
  let report;
  try {
    report = JSON.parse(readFileSync(file, 'utf8'));
  } catch (error) {
    return { ...none, problems: [`${name}: unreadable report: ${error.message}`] };
  }
  const problems = [];
  const tests = report.testResults.flatMap((suite) => suite.assertionResults);
  const count = (...states) => tests.filter((test) => states.includes(test.status)).length;
  const passed = count('passed');
  const failedTests = count('failed');
  const broken = report.testResults.filter((s) => s.status === 'failed' && !s.assertionResults.some((t) => t.status === 'failed'));
  for (const suite of broken)
    problems.push(`${name}: ${suite.name}: ${(suite.message ?? '').split('\n')[0] || 'failed outside its tests'}`);
  if (failedTests > 0) problems.push(`${name}: ${failedTests} ${failedTests === 1 ? 'test' : 'tests'}`);
  if (tests.length === 0 && broken.length === 0) problems.push(`${name}: no tests`);
  let failed = failedTests + broken.length;
  if (failed === 0 && (exitCode !== 0 || tests.length === 0)) {
    failed = 1;
    if (exitCode !== 0) problems.push(`${name}: exit code ${exitCode}, though no test failed`);
  }
  return { passed, failed, skipped: tests.length - passed - failedTests, problems };
}

export const summary = ({ passed, failed, skipped }) => `${passed} passed, ${failed} failed, ${skipped} skipped`;
