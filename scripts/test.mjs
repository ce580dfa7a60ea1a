// `npm test [-- --release]`: set-up, lint, types, docs, then every package's tests. The last line sums them: N passed, N failed, N skipped.
// --release: a release of what set-up built, into a registry of this machine, used from there by this Node (scripts/release/dry.mjs).
import { mkdirSync, readdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { bin, root, run } from './lib.mjs';
import { summary, tallyReport } from './tally.mjs';

const { values } = parseArgs({ options: { release: { type: 'boolean' } } });
const started = performance.now();
const minutes = () => `${((performance.now() - started) / 60_000).toFixed(1)} min`;
const total = { passed: 0, failed: 0, skipped: 0 };
const problems = [];
const check = (what, command, args) => {
  if (run(command, args, { allowFailure: true }) === 0) return;
  total.failed++;
  problems.push(what);
};
const finish = () => {
  console.log(`\n${minutes()} in all`);
  for (const problem of problems) console.log(`failed: ${problem}`);
  console.log(summary(total));
  process.exit(total.failed > 0 ? 1 : 0);
};

check('set-up', process.execPath, [join(root, 'scripts/setup.mjs')]);
if (total.failed > 0) finish();
console.log(`== set up after ${minutes()}`);
check('lint', bin('biome'), ['ci', '.']);
check('types', bin('tsc'), ['--noEmit', '-p', 'tsconfig.json']);
check('docs', process.execPath, [join(root, 'scripts/docs/build.mjs'), '--quiet']);

const reports = join(root, '.test-reports');
rmSync(reports, { recursive: true, force: true });
mkdirSync(reports);
const suites = [
  ...readdirSync(join(root, 'packages')).map((name) => ({ name, dir: join(root, 'packages', name) })),
  { name: 'test', dir: join(root, 'test') },
];
for (const { name, dir } of suites) {
  console.log(`\n== ${name} (after ${minutes()})`);
  const code = run(process.execPath, [join(root, 'scripts/vitest.mjs'), name], { cwd: dir, allowFailure: true });
  const tally = tallyReport(name, join(reports, `${name}.json`), code);
  total.passed += tally.passed;
  total.failed += tally.failed;
  total.skipped += tally.skipped;
  problems.push(...tally.problems);
}
if (values.release) {
  console.log(`\n== release (after ${minutes()})`);
  check('release', process.execPath, [join(root, 'scripts/release/dry.mjs'), '--node', process.versions.node.split('.')[0]]);
}
finish();
