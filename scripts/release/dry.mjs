// `npm run release:dry [-- --node 20,22]`: a whole release without the last step. In a copy of the working tree: versions, publishes every package to a registry on
// this machine, looks at the tarballs as publint and attw do, installs them with npm, pnpm and yarn in clean folders without a compiler, and uses them there;
// then the examples. Node 20, 22 and 24 by default. Packages must be built (`npm run build`, or `npm run release:build` for all targets).
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { snippets } from '../../test/snippets.mjs';
import { bin, root } from '../lib.mjs';
import { buildInfo, TARBALL_LIMIT } from './addon.mjs';
import { Consumer, execute, managers, npmProgram } from './consumer.mjs';
import { copyTree, treeState } from './copy.mjs';
import { runExamples, setExampleVersions } from './examples.mjs';
import { listing, loading } from './programs.mjs';
import { startRegistry } from './registry.mjs';
import { setRepository } from './repository.mjs';
import { nodeOf, tools } from './tools.mjs';

/** What a README's first block may take. */
const README_MS = 5000;
const { values } = parseArgs({ options: { node: { type: 'string', default: '20,22,24' } } });
const started = performance.now();
const say = (text) => console.log(`== ${text} (after ${((performance.now() - started) / 1e3).toFixed(0)} s)`);
const seconds = (ms) => `${(ms / 1e3).toFixed(1)} s`;
const manifestOf = (tree, name) => JSON.parse(readFileSync(join(tree, 'packages', name, 'package.json'), 'utf8'));

const packages = readdirSync(join(root, 'packages'));
const native = packages.filter((name) => existsSync(join(root, 'packages', name, 'native/binding.gyp')));
const addonOf = (name) => join(root, 'packages', name, 'prebuilds/linux-x64', `@lc+${name}.glibc.node`);
const unbuilt = packages.filter(
  (name) => !existsSync(join(root, 'packages', name, 'dist/index.js')) || (native.includes(name) && !existsSync(addonOf(name))),
);
if (unbuilt.length > 0) {
  console.error(`[lc] not built: ${unbuilt.join(', ')}; npm run build first`);
  process.exit(1);
}
const problems = [];

say('programs');
const programs = { npm: npmProgram(), pnpm: join(root, 'node_modules/pnpm/bin/pnpm.cjs'), tools: tools() };
const nodes = values.node.split(',').map((major) => ({ major, program: nodeOf(major) }));
// esbuild comes with tsup.
const { transform } = await import(createRequire(createRequire(join(root, 'package.json')).resolve('tsup')).resolve('esbuild'));

const before = treeState();
const home = mkdtempSync(join(tmpdir(), 'lc-dry-'));
let registry;
try {
  registry = await release();
} finally {
  await registry?.stop();
  rmSync(home, { recursive: true, force: true });
}
if (treeState() !== before) problems.push('the working tree has changed meanwhile');
for (const problem of problems) console.error(`[lc] ${problem}`);
say(problems.length > 0 ? `${problems.length} problems` : 'a release would work');
process.exit(problems.length > 0 ? 1 : 0);

async function release() {
  const tree = join(home, 'tree');
  const version = await versioned(tree);
  say(`publishing ${version}`);
  const server = await startRegistry({
    dir: join(home, 'registry'),
    program: join(programs.tools, 'verdaccio/bin/verdaccio'),
    uplink: (await execute('npm', ['config', 'get', 'registry'], { cwd: root })).output.trim(),
  });
  try {
    await publish(tree, server);
    const missing = packages.filter((name) => !existsSync(server.tarball(name, version)));
    if (missing.length > 0) throw new Error(`not published: ${missing.join(', ')}\n${readFileSync(server.log, 'utf8')}`);
    say('tarballs: publint, attw, size');
    for (const name of packages) await inspectTarball(name, server.tarball(name, version));
    say('each package alone');
    const rows = [];
    for (const name of packages) rows.push(await alone(name, server, version));
    say('all packages, by Node and package manager');
    const matrix = [];
    for (const node of nodes) for (const manager of managers) matrix.push(await together(node, manager, server));
    say('examples');
    const examples = [];
    for (const node of nodes) {
      const options = { tree, home, node, registry: server.url, programs };
      examples.push(...(await runExamples(options, (problem) => problems.push(problem))));
    }
    console.log(
      'each package in a clean folder with @lc/tensor, by npm with an empty cache; import and native code in a new process, median of 3',
    );
    console.table(rows);
    console.table(matrix);
    console.table(examples);
    const { install, README } = rows.find((row) => row.package === '@lc/chunked-ce');
    console.log(`fresh folder, npm i @lc/chunked-ce @lc/tensor: ${install}; its README's first block, a new process: ${README}`);
  } catch (error) {
    await server.stop();
    throw error;
  }
  return server;
}

/** Copies the tree, takes the changesets up, and gives the version of all packages. */
async function versioned(tree) {
  say('copy and versions');
  copyTree(tree);
  const old = manifestOf(tree, 'tensor').version;
  await execute(bin('changeset'), ['version'], { cwd: tree });
  setRepository(tree);
  const versions = new Set(packages.map((name) => manifestOf(tree, name).version));
  if (versions.size !== 1) throw new Error(`versions differ: ${[...versions].join(', ')}; .changeset/config.json has a fixed group`);
  const [version] = versions;
  setExampleVersions(tree, version);
  for (const name of native) {
    const built = buildInfo(readFileSync(addonOf(name)))?.version;
    if (built !== old) problems.push(`${addonOf(name)} is of version ${built}, the tree of ${old}`);
  }
  if (old === version) return version;
  console.log(`${old} becomes ${version}; addons still say ${old}: a release builds them after \`npm run version\``);
  for (const name of packages) {
    const dir = join(tree, 'packages', name);
    if (/__LC_VERSION__/.test(readFileSync(join(dir, 'tsup.config.ts'), 'utf8'))) await execute(bin('tsup'), [], { cwd: dir });
  }
  return version;
}

/** As a release does it, but for the registry. */
async function publish(tree, { url }) {
  const settings = join(home, 'npmrc');
  writeFileSync(settings, `registry=${url}\n${url.replace('http:', '')}:_authToken=none\n`); // npm wants a token; the registry asks for none
  const PATH = `${join(root, 'node_modules/.bin')}:${process.env.PATH}`;
  const env = { ...process.env, PATH, npm_config_userconfig: settings, npm_config_registry: url };
  await execute(bin('changeset'), ['publish', '--no-git-tag'], { cwd: tree, env });
}

async function inspectTarball(name, file) {
  const checks = [
    ['publint', [join(programs.tools, 'publint/src/cli.js'), 'run', file, '--strict']],
    // Node 20 knows `exports`: how Node 10 resolved is nothing to us.
    ['attw', [join(programs.tools, '@arethetypeswrong/cli/dist/index.js'), file, '--profile', 'node16']],
  ];
  await Promise.all(
    checks.map(([what, args]) =>
      execute(process.execPath, args, { cwd: home, env: { ...process.env, NO_COLOR: '1' } }).catch((error) =>
        problems.push(`@lc/${name}: ${what}: ${error.message}`),
      ),
    ),
  );
  const { size } = statSync(file);
  if (size > TARBALL_LIMIT) problems.push(`@lc/${name}: the tarball has ${size} bytes, at most ${TARBALL_LIMIT} are allowed`);
}

/** The package as its README shows it, on the first Node. */
async function alone(name, server, version) {
  const user = new Consumer({
    home: join(home, 'alone', name), // caches too
    name: 'user',
    node: nodes[0].program,
    manager: 'npm',
    registry: server.url,
    programs,
  });
  const row = { package: `@lc/${name}`, tarball: `${(statSync(server.tarball(name, version)).size / 1e6).toFixed(2)} MB` };
  const program = await snippet(name);
  const imported = [...program.matchAll(/['"](@lc\/[^'"/]+)/g)].map(([, other]) => other);
  row.install = seconds(await user.add([...new Set([`@lc/${name}`, '@lc/tensor', ...imported])]));
  const times = [];
  for (let i = 0; i < 3; i++) times.push(JSON.parse((await user.script('loading.mjs', loading(name, native.includes(name)))).output));
  const median = (index) => times.map((pair) => pair[index]).sort((a, b) => a - b)[1];
  row.import = `${median(0).toFixed(0)} ms`;
  row['with native code'] = native.includes(name) ? `${median(1).toFixed(0)} ms` : '';
  const { ms } = await user.script('readme.mjs', program);
  if (ms > README_MS)
    problems.push(`@lc/${name}: its README's first block takes ${seconds(ms)}, at most ${seconds(README_MS)} are allowed`);
  row.README = `${ms.toFixed(0)} ms`;
  return row;
}

/** README's first block as a program. */
async function snippet(name) {
  const [block] = snippets(readFileSync(join(root, 'packages', name, 'README.md'), 'utf8'));
  return (await transform(block, { loader: 'ts', format: 'esm', target: 'node20' })).code;
}

async function together({ major, program }, manager, server) {
  const label = `Node ${major}, ${manager}`;
  const row = { Node: major, manager };
  const parent = join(home, 'all');
  mkdirSync(parent, { recursive: true });
  const user = new Consumer({ home: parent, name: `${major}-${manager}`, node: program, manager, registry: server.url, programs });
  const attempt = async (column, work) => {
    try {
      row[column] = (await work()) ?? 'ok';
    } catch (error) {
      row[column] = 'failed';
      problems.push(`${label}: ${column}: ${error.message}`);
    }
  };
  await attempt('install', async () => seconds(await user.add(packages.map((name) => `@lc/${name}`))));
  if (row.install === 'failed') return row;
  const entries = packages.flatMap((name) =>
    Object.keys(manifestOf(root, name).exports)
      .filter((path) => path !== './testing') // needs vitest
      .map((path) => join('@lc', name, path)),
  );
  let names = '';
  await attempt('ESM', async () => {
    names = (await user.script('list.mjs', listing(entries, 'await import(name)'))).output;
  });
  await attempt('CommonJS', async () => {
    if ((await user.script('list.cjs', listing(entries, 'require(name)'))).output !== names)
      throw new Error('exports other names than ESM');
  });
  await attempt('READMEs', async () => {
    for (const name of packages) await user.script(`readme-${name}.mjs`, await snippet(name));
    return `${packages.length} run`;
  });
  return row;
}
