// What the root scripts share: running commands, the pinned pnpm, the toolchain file that turbo hashes.
import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const root = dirname(dirname(fileURLToPath(import.meta.url)));
export const manifest = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));

/** Runs a command in the foreground; exits with its code when it fails. */
export function run(command, args, options = {}) {
  const result = spawnSync(command, args, { cwd: root, stdio: 'inherit', ...options });
  if (result.error) {
    console.error(`[lc] ${command}: ${result.error.message}`);
    process.exit(1);
  }
  if (result.status !== 0 && !options.allowFailure) {
    console.error(`[lc] failed: ${command} ${args.join(' ')}`);
    process.exit(result.status ?? 1);
  }
  return result.status ?? 1;
}

/** pnpm at the version that package.json pins; nothing needs to be installed globally. */
export function pnpm(args) {
  run('npx', ['--yes', manifest.packageManager, ...args], { env: { ...process.env, CI: process.env.CI ?? '1' } });
}

export const bin = (name) => join(root, 'node_modules/.bin', name);

/** Installs dependencies when the lock file is newer than the last install. */
export function install() {
  const stamp = join(root, 'node_modules/.modules.yaml');
  const fresh = existsSync(stamp) && statSync(stamp).mtimeMs >= statSync(join(root, 'pnpm-lock.yaml')).mtimeMs;
  if (!fresh) pnpm(['install', '--frozen-lockfile', '--prefer-offline']);
}

/** turbo does not see compilers: their versions go into a file that it hashes. Prints why CUDA is left out, if it is. */
export function writeToolchain() {
  const detect = createRequire(import.meta.url)('../native/detect.cjs');
  const { why } = detect.cuda();
  if (why) console.log(why);
  const file = join(root, '.toolchain');
  const text = detect.toolchain();
  if (!existsSync(file) || readFileSync(file, 'utf8') !== text) writeFileSync(file, text);
}

/** Builds tasks through turbo's cache. Native builds run one at a time: each uses every core. */
export function turbo(tasks, extra = []) {
  writeToolchain();
  run(bin('turbo'), ['run', ...tasks, '--concurrency=1', '--output-logs=new-only', '--no-update-notifier', ...extra], {
    // turbo looks for pnpm on the PATH.
    env: {
      ...process.env,
      PATH: `${join(root, 'node_modules/.bin')}:${process.env.PATH}`,
      TURBO_TELEMETRY_DISABLED: '1',
      DO_NOT_TRACK: '1',
    },
  });
}
