/** Packs the packages as they would be published and installs tarballs with npm: offline, without install scripts, outside the workspace. */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, readFileSync, realpathSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const root = join(dirname(fileURLToPath(import.meta.url)), '../..');
export const packages = readdirSync(join(root, 'packages'));

export interface Manifest {
  name: string;
  version: string;
  main?: string;
  exports?: Record<string, unknown>;
  bin?: Record<string, string>;
  scripts?: Record<string, string>;
  dependencies?: Record<string, string>;
  peerDependencies?: Record<string, string>;
}
export const readManifest = (dir: string): Manifest => JSON.parse(readFileSync(join(dir, 'package.json'), 'utf8')) as Manifest;

export function execute(command: string, args: readonly string[], cwd: string, env: NodeJS.ProcessEnv = process.env): string {
  const result = spawnSync(command, args, { cwd, env, encoding: 'utf8', maxBuffer: 64 << 20 });
  if (result.status !== 0)
    throw new Error(`${command} ${args.join(' ')}: ${result.error?.message ?? result.status}\n${result.stdout}\n${result.stderr}`);
  return result.stdout;
}

/** What users run has nothing of the workspace in its environment. */
export function plainEnv(home: string): NodeJS.ProcessEnv {
  const keep = Object.entries(process.env).filter(([name]) => !/^(npm_|NODE_|LCTX_|VITEST|PNPM_|INIT_CWD)/i.test(name));
  return { ...Object.fromEntries(keep), HOME: home, NO_COLOR: '1' };
}

/** Third-party packages that these need, all the way down, from the workspace's own node_modules. */
function thirdParty(names: readonly string[]): Map<string, string> {
  const found = new Map<string, string>();
  const visit = (dir: string): void => {
    const { dependencies = {} } = readManifest(dir);
    for (const name of Object.keys(dependencies)) {
      if (name.startsWith('@lc/') || found.has(name)) continue;
      const search = createRequire(join(realpathSync(dir), 'package.json')).resolve.paths(name) ?? [];
      const at = search.map((path) => join(path, name)).find((path) => existsSync(join(path, 'package.json')));
      if (!at) throw new Error(`${name}, which ${dir} needs, is not installed`);
      found.set(name, realpathSync(at));
      visit(at);
    }
  };
  for (const name of names) visit(join(root, 'packages', name));
  return found;
}

/** Tarballs by package name. */
export class Tarballs {
  readonly files = new Map<string, string>();
  private readonly dir: string;

  constructor(private readonly home: string) {
    this.dir = join(home, 'tarballs');
    mkdirSync(this.dir);
    execute(join(root, 'node_modules/.bin/pnpm'), ['--filter', './packages/*', '-r', 'pack', '--pack-destination', this.dir], root);
    for (const name of packages) {
      const { version } = readManifest(join(root, 'packages', name));
      this.files.set(`@lc/${name}`, join(this.dir, `lc-${name}-${version}.tgz`));
    }
    for (const [name, from] of thirdParty(packages)) {
      const file = join(this.dir, `${name.replace(/[@/]/g, '_')}.tgz`);
      execute('tar', ['czf', file, '--exclude=node_modules', '--hard-dereference', '--transform=s,^\\.,package,', '.'], from);
      this.files.set(name, file);
    }
  }

  /** A new project with these packages of ours, what they depend on, and nothing else. */
  install(folder: string, names: readonly string[]): string {
    const dir = join(this.home, folder);
    mkdirSync(dir);
    const dependencies: Record<string, string> = {};
    const ours = new Set<string>();
    const add = (name: string): void => {
      if (ours.has(name)) return;
      ours.add(name);
      dependencies[`@lc/${name}`] = `file:${this.files.get(`@lc/${name}`)}`;
      const manifest = readManifest(join(root, 'packages', name));
      for (const other of Object.keys({ ...manifest.dependencies, ...manifest.peerDependencies })) {
        if (other.startsWith('@lc/')) add(other.slice(4));
      }
    };
    for (const name of names) add(name);
    for (const name of thirdParty([...ours]).keys()) dependencies[name] = `file:${this.files.get(name)}`;
    writeFileSync(join(dir, 'package.json'), JSON.stringify({ name: folder, private: true, type: 'module', dependencies }));
    const env = { ...plainEnv(this.home), npm_config_cache: join(this.home, 'npm-cache') };
    execute('npm', ['install', '--offline', '--ignore-scripts', '--no-audit', '--no-fund', '--strict-peer-deps'], dir, env);
    return dir;
  }
}
