/** A copy of the workspace's sources in a temporary folder, to ask turbo what an edit there would rebuild. */
import { spawnSync } from 'node:child_process';
import { appendFileSync, cpSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const root = join(dirname(fileURLToPath(import.meta.url)), '../..');
const bin = join(root, 'node_modules/.bin');
export const packages = readdirSync(join(root, 'packages'));
export const native = packages.filter((name) => existsSync(join(root, 'packages', name, 'native/binding.gyp')));

interface Task {
  taskId: string;
  hash: string;
  command: string;
  cache: { status: 'HIT' | 'MISS' };
}

export class TurboCopy implements Disposable {
  readonly dir = mkdtempSync(join(tmpdir(), 'lc-turbo-'));

  constructor() {
    const copy = (path: string): void => {
      if (!existsSync(join(root, path))) return;
      cpSync(join(root, path), join(this.dir, path), {
        recursive: true,
        filter: (source) => !/\/(native\/build|node_modules)$/.test(source),
      });
    };
    for (const file of ['package.json', 'pnpm-lock.yaml', 'pnpm-workspace.yaml', 'turbo.json', 'tsconfig.base.json', 'native']) copy(file);
    for (const name of packages) {
      for (const part of ['package.json', 'tsconfig.json', 'tsup.config.ts', 'README.md', 'src', 'native', 'test'])
        copy(`packages/${name}/${part}`);
    }
    for (const other of ['test', 'examples/quickstart']) copy(`${other}/package.json`);
    this.write('.toolchain', 'g++ 12\ncpu only\n');
  }

  write(path: string, text: string): void {
    mkdirSync(dirname(join(this.dir, path)), { recursive: true });
    writeFileSync(join(this.dir, path), text);
  }
  append(path: string, text = '\n'): void {
    appendFileSync(join(this.dir, path), text);
  }
  remove(path: string): void {
    rmSync(join(this.dir, path), { recursive: true });
  }
  exists(path: string): boolean {
    return existsSync(join(this.dir, path));
  }

  /** Replaces what a package's scripts run, so that a build takes no time. */
  stubScripts(script: (task: string, name: string) => string): void {
    for (const name of packages) {
      const path = `packages/${name}/package.json`;
      const manifest = JSON.parse(readFileSync(join(this.dir, path), 'utf8')) as { scripts: Record<string, string> };
      for (const task of ['build', 'build:native']) if (manifest.scripts[task]) manifest.scripts[task] = script(task, name);
      this.write(path, JSON.stringify(manifest));
    }
  }

  run(args: readonly string[], env: Record<string, string> = {}): string {
    const inherited = Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^(LCTX_|TURBO_|CXX|CUDA_)/.test(name)));
    const result = spawnSync(join(bin, 'turbo'), ['run', ...args, '--skip-infer', '--no-update-notifier', '--cwd', this.dir], {
      encoding: 'utf8',
      env: { ...inherited, PATH: `${bin}:${process.env.PATH}`, TURBO_TELEMETRY_DISABLED: '1', ...env },
      maxBuffer: 64 << 20,
    });
    if (result.status !== 0) throw new Error(`turbo failed (${result.status}):\n${result.stdout}\n${result.stderr}`);
    return result.stdout;
  }

  /** Every task with a command, as turbo would run it now. */
  tasks(env: Record<string, string> = {}): Map<string, Task> {
    const { tasks } = JSON.parse(this.run(['build', '--dry=json'], env)) as { tasks: Task[] };
    return new Map(tasks.filter((task) => task.command !== '<NONEXISTENT>').map((task) => [task.taskId.replace('@lc/', ''), task]));
  }

  [Symbol.dispose](): void {
    rmSync(this.dir, { recursive: true, force: true });
  }
}
