// A user's project: a clean folder, a PATH of node and sh alone, no install scripts, packages from the local registry.
import { spawn } from 'node:child_process';
import { cpSync, mkdirSync, realpathSync, symlinkSync, writeFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';

/** Runs to the end and gives `{ output, ms }`; what fails throws its output. */
export function execute(command, args, options) {
  const from = performance.now();
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, { ...options, stdio: ['ignore', 'pipe', 'pipe'] });
    let output = '';
    const collect = (chunk) => {
      output += chunk;
    };
    child.stdout.on('data', collect);
    child.stderr.on('data', collect);
    child.on('error', reject);
    child.on('close', (code, signal) => {
      if (code === 0) resolve({ output, ms: performance.now() - from });
      else reject(new Error(`${command} ${args.join(' ')} (in ${options.cwd}): ${signal ?? `exit code ${code}`}\n${output}`));
    });
  });
}

/** `[program, ...arguments]` that add packages to a project, by manager. */
const ADD = {
  npm: ({ npm }) => [npm, 'install', '--ignore-scripts', '--no-audit', '--no-fund', '--strict-peer-deps', '--loglevel=error'],
  pnpm: ({ pnpm }) => [pnpm, 'add', '--ignore-scripts', '--strict-peer-dependencies', '--reporter=append-only', '--loglevel=error'],
  yarn1: ({ tools }) => [join(tools, 'yarn/bin/yarn.js'), 'add', '--ignore-scripts', '--non-interactive', '--silent'],
  yarn4: ({ tools }) => [join(tools, '@yarnpkg/cli-dist/bin/yarn.js'), 'add'],
};
export const managers = Object.keys(ADD);

export class Consumer {
  /**
   * @param {{ home: string, name: string, node: string, manager: string, registry: string, programs: { npm: string, pnpm: string, tools: string }, project?: string }} options
   * project: a folder to begin with a copy of, without what was installed and built there; else an empty project
   */
  constructor({ home, name, node, manager, registry, programs, project }) {
    Object.assign(this, { node, manager, programs });
    this.dir = join(home, name);
    const bin = join(this.dir, '.path');
    mkdirSync(bin, { recursive: true });
    symlinkSync(node, join(bin, 'node'));
    symlinkSync('/bin/sh', join(bin, 'sh'));
    this.env = {
      PATH: bin,
      HOME: join(home, 'home'),
      NO_COLOR: '1',
      CI: '1',
      npm_config_cache: join(home, 'npm-cache'),
      YARN_CACHE_FOLDER: join(home, 'yarn-cache'),
      YARN_ENABLE_TELEMETRY: '0',
    };
    // A proxy of this machine is none of the packages' business, but certificates and proxies are how some machines reach a registry at all.
    for (const key of ['HTTP_PROXY', 'HTTPS_PROXY', 'NO_PROXY', 'http_proxy', 'https_proxy', 'no_proxy']) {
      if (process.env[key]) this.env[key] = process.env[key];
    }
    const made = ['node_modules', 'build', 'outputs'];
    if (project) cpSync(project, this.dir, { recursive: true, filter: (path) => !made.includes(basename(path)) });
    else writeFileSync(join(this.dir, 'package.json'), JSON.stringify({ name: 'user', version: '1.0.0', private: true, type: 'module' }));
    writeFileSync(join(this.dir, '.npmrc'), `registry=${registry}\nupdate-notifier=false\nstore-dir=${join(home, 'pnpm-store')}\n`);
    if (manager === 'yarn1') writeFileSync(join(this.dir, '.yarnrc'), `registry "${registry}"\n`);
    if (manager === 'yarn4') {
      const settings = {
        npmRegistryServer: registry,
        unsafeHttpWhitelist: ['127.0.0.1'],
        enableScripts: false,
        enableTelemetry: false,
        enableImmutableInstalls: false,
        enableGlobalCache: false,
        npmPreapprovedPackages: ['@lc/*'], // what was just published is quarantined otherwise
        nodeLinker: 'node-modules',
      };
      writeFileSync(join(this.dir, '.yarnrc.yml'), JSON.stringify(settings));
      writeFileSync(join(this.dir, 'yarn.lock'), ''); // a project of its own, whatever lies above it
    }
  }

  /** Installs these packages, or what the project names; milliseconds that it took. */
  async add(names) {
    const { ms } = await this.run([...ADD[this.manager](this.programs), ...names]);
    return ms;
  }

  run(args, env = {}) {
    return execute(this.node, args, { cwd: this.dir, env: { ...this.env, ...env } });
  }

  /** Runs a program text as a file of the project. */
  script(file, text) {
    writeFileSync(join(this.dir, file), text);
    return this.run([file]);
  }
}

/** npm's program lies beside node's, wherever they came from. */
export const npmProgram = () => realpathSync(join(dirname(process.execPath), 'npm'));
