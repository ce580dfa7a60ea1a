// A Verdaccio registry on this machine, empty but for what is published to it; everything else comes from the usual registry through it.
import { spawn } from 'node:child_process';
import { mkdirSync, openSync, readFileSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

const freePort = () =>
  new Promise((resolve, reject) => {
    const server = createServer();
    server.on('error', reject).listen(0, '127.0.0.1', () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });

/** `{ url, tarball(name, version), stop() }` */
export async function startRegistry({ dir, program, uplink }) {
  mkdirSync(dir, { recursive: true });
  const port = await freePort();
  const url = `http://127.0.0.1:${port}/`;
  const config = {
    storage: join(dir, 'storage'),
    auth: { htpasswd: { file: join(dir, 'htpasswd') } },
    // By default two answers that fail take the registry away for five minutes; the package managers ask again by themselves.
    uplinks: { npm: { url: uplink, timeout: '60s', max_fails: 20, fail_timeout: '5s' } },
    packages: { '@lc/*': { access: '$all', publish: '$all' }, '**': { access: '$all', proxy: 'npm' } },
    max_body_size: '50mb',
    log: { type: 'stdout', format: 'pretty', level: 'warn' },
  };
  const file = join(dir, 'config.yaml');
  writeFileSync(file, JSON.stringify(config)); // JSON is YAML
  const log = join(dir, 'log');
  const out = openSync(log, 'w');
  const server = spawn(process.execPath, [program, '--config', file, '--listen', `127.0.0.1:${port}`], {
    cwd: dir,
    stdio: ['ignore', out, out],
  });
  const exited = new Promise((resolve) => server.once('exit', resolve));
  const stop = async () => {
    server.kill();
    await exited;
  };
  const deadline = Date.now() + 60_000;
  for (;;) {
    const up = await fetch(`${url}-/ping`).then(
      (reply) => reply.ok,
      () => false,
    );
    if (up) break;
    if (server.exitCode !== null || Date.now() > deadline) {
      await stop();
      throw new Error(`the registry did not start:\n${readFileSync(log, 'utf8')}`);
    }
    await sleep(200);
  }
  return { url, stop, log, tarball: (name, version) => join(dir, 'storage/@lc', name, `${name}-${version}.tgz`) };
}
