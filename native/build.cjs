// build.cjs packages/<name> [...]: builds addons incrementally into packages/<name>/prebuilds/<platform>-<arch>/.
const { execFileSync } = require('node:child_process');
const { copyFileSync, existsSync, mkdirSync, renameSync, rmSync } = require('node:fs');
const { availableParallelism } = require('node:os');
const { basename, dirname, join, resolve } = require('node:path');
const { cuda } = require('./detect.cjs');
const { locked } = require('./lock.cjs');

const root = resolve(__dirname, '..');
const nodeGyp = require.resolve('node-gyp/bin/node-gyp.js', { paths: [root] });
const env = { ...process.env };
// node-gyp would download headers; those beside this node (packages of distributions, tarballs, nvm) are the right ones.
const prefix = join(dirname(process.execPath), '..');
if (existsSync(join(prefix, 'include/node/node_api.h'))) env.npm_config_nodedir = prefix;

try {
  const { why } = cuda();
  if (why) console.log(why);
} catch (error) {
  console.error(error.message);
  process.exit(1);
}

const jobs = process.env.LCTX_JOBS ?? String(availableParallelism());
for (const folder of process.argv.slice(2)) {
  const dir = resolve(root, folder);
  const name = basename(dir);
  mkdirSync(join(dir, 'native/build'), { recursive: true });
  // Two node-gyp runs in one folder would write the same objects.
  locked(join(dir, 'native/build/.lock'), () => build(dir, name));
}

function build(dir, name) {
  execFileSync(process.execPath, [nodeGyp, '-C', join(dir, 'native'), 'configure', 'build', '-j', jobs, '--silent'], {
    cwd: dir,
    env,
    stdio: 'inherit',
  });
  const built = join(dir, 'native/build/Release', `lc_${name.replaceAll('-', '_')}.node`);
  const out = join(dir, 'prebuilds', `${process.platform}-${process.arch}`);
  mkdirSync(out, { recursive: true });
  const target = join(out, `@lc+${name}.glibc.node`);
  const temporary = `${target}.tmp`;
  copyFileSync(built, temporary);
  execFileSync('strip', ['--strip-unneeded', temporary]);
  renameSync(temporary, target); // a process that has the old one mapped keeps it
  rmSync(temporary, { force: true });
}
