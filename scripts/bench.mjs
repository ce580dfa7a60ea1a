// `npm run bench [-- filter]`: set-up, then every packages/*/bench/*.bench.mjs whose path contains the filter, one at a time.
import './setup.mjs';
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { root, run } from './lib.mjs';

const [filter = ''] = process.argv.slice(2);
let ran = 0;
let failed = 0;
for (const name of readdirSync(join(root, 'packages'))) {
  const dir = join(root, 'packages', name, 'bench');
  const files = existsSync(dir) ? readdirSync(dir).filter((file) => file.endsWith('.bench.mjs')) : [];
  for (const file of files) {
    const path = `packages/${name}/bench/${file}`;
    if (!path.includes(filter)) continue;
    console.log(`\n== ${path}`);
    ran++;
    if (run(process.execPath, [join(dir, file)], { allowFailure: true }) !== 0) failed++;
  }
}
if (ran === 0) console.error(`[lc] no bench's path contains '${filter}'`);
process.exit(ran === 0 || failed > 0 ? 1 : 0);
