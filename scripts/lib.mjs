// What the root scripts share: running commands, the pinned pnpm, the toolchain file that turbo hashes.
import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const root = dirname(dirname(fileURLToPath(import.meta.url)));
export const manifest = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));

/** Runs a command in the foreground and gives its exit code; without `allowFailure` this process exits when it fails. */
export function run(command, args, { allowFailure = false, ...options } = {}) {
  const result = spawnSync(command, args, { cwd: root, stdio: 'inherit', ...options });
  const code = result.error ? 127 : (result.status ?? 1); // null: ended by a signal
  if (code !== 0) {
    const why = result.error?.message ?? (result.signal ? `ended by ${result.signal}` : `exit code ${code}`);
    console.error(`[lc] failed: ${command} ${args.join(' ')} (${why})`);
    if (!allowFailure) process.exit(code);
  }
  return code;
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
  if (fresh) return;
  console.log(`[lc] installing dependencies with ${manifest.packageManager}`);
  // Errors only: before the first build pnpm warns of commands whose file does not exist yet.
  pnpm(['install', '--frozen-lockfile', '--prefer-offline', '--loglevel=error']);
}

/** turbo does not see compilers: their versions go into a file that it hashes. Prints why CUDA is left out, if it is. */
export function writeToolchain() {
  const detect = createRequire(import.meta.url)('../native/detect.cjs');
  let text;
  try {
    const { why } = detect.cuda();
    if (why) console.log(why);
    text = detect.toolchain();
  } catch (error) {
    console.error(error.message);
    process.exit(1);
  }
  const file = join(root, '.toolchain');
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
