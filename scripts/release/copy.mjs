// A copy of the working tree to version and publish from: the tree itself stays as it is.
import { execFileSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, readdirSync, rmSync, symlinkSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { root } from '../lib.mjs';

const git = (cwd, ...args) => execFileSync('git', args, { cwd, encoding: 'utf8', maxBuffer: 64 << 20 });
const lines = (text) => text.split('\0').filter(Boolean);

/** Tracked files and new ones as they are now, with what was built of the packages; git's history is shared, dependencies are links. */
export function copyTree(to) {
  git(root, 'clone', '--quiet', '--shared', root, to);
  for (const file of lines(git(root, 'ls-files', '-z', '--cached', '--others', '--exclude-standard'))) {
    if (!existsSync(join(root, file))) rmSync(join(to, file), { force: true });
    else {
      mkdirSync(dirname(join(to, file)), { recursive: true });
      cpSync(join(root, file), join(to, file), { verbatimSymlinks: true });
    }
  }
  symlinkSync(join(root, 'node_modules'), join(to, 'node_modules'));
  for (const name of readdirSync(join(root, 'packages'))) {
    // pnpm's node_modules are relative links: copied, those to other packages lead to the copies, whose versions are what pnpm publishes.
    for (const built of ['dist', 'prebuilds', 'node_modules']) {
      const from = join(root, 'packages', name, built);
      if (existsSync(from)) cpSync(from, join(to, 'packages', name, built), { recursive: true, verbatimSymlinks: true });
    }
  }
}

export const treeState = () => git(root, 'status', '--porcelain') + git(root, 'diff');
