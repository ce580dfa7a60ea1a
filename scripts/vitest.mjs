// vitest.mjs <package> [args]: one package's tests, with a JSON report for the summary.
import { join } from 'node:path';
import { bin, root, run } from './lib.mjs';

const [name, ...args] = process.argv.slice(2);
const report = join(root, '.test-reports', `${name}.json`);
process.exit(
  run(bin('vitest'), ['run', '--reporter=default', '--reporter=json', `--outputFile.json=${report}`, ...args], {
    cwd: process.cwd(),
    allowFailure: true,
  }),
);
