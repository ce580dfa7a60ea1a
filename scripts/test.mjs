// `npm test`: set-up, lint, types, then every package's tests. The last line sums them: N passed, N failed, N skipped.
import './setup.mjs';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { bin, root, run } from './lib.mjs';

const reports = join(root, '.test-reports');
rmSync(reports, { recursive: true, force: true });
mkdirSync(reports);

const problems = [];
const check = (what, command, args, options = {}) => {
  if (run(command, args, { allowFailure: true, ...options }) !== 0) problems.push(what);
};
check('lint', bin('biome'), ['ci', '.']);
check('types', bin('tsc'), ['--noEmit', '-p', 'tsconfig.json']);

const total = { passed: 0, failed: 0, skipped: 0 };
const suites = [
  ...readdirSync(join(root, 'packages')).map((name) => ({ name, dir: join(root, 'packages', name) })),
  { name: 'test', dir: join(root, 'test') },
];
for (const { name, dir } of suites) {
  console.log(`\n== ${name}`);
  check(`tests of ${name}`, process.execPath, [join(root, 'scripts/vitest.mjs'), name], { cwd: dir });
  const file = join(reports, `${name}.json`);
  if (!existsSync(file)) {
    problems.push(`${name} wrote no report`);
    continue;
  }
  const report = JSON.parse(readFileSync(file, 'utf8'));
  total.passed += report.numPassedTests;
  total.failed += report.numFailedTests;
  total.skipped += report.numPendingTests + report.numTodoTests;
  if (report.numTotalTests === 0) problems.push(`${name} has no tests`);
}
// What failed outside a test (lint, types, a crashed suite) counts as a failure too.
const outside = problems.filter((problem) => !problem.startsWith('tests of') || total.failed === 0);
total.failed += outside.length;
if (problems.length > 0) console.log(`\nfailed: ${problems.join(', ')}`);
console.log(`${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`);
process.exit(total.failed > 0 ? 1 : 0);
