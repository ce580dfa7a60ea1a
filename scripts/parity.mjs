// `npm run test:parity`: set-up, then the parity suite alone, against LCTX_REFERENCE_MODELS or the project's own reference models.
import './setup.mjs';
import { join } from 'node:path';
import { bin, root, run } from './lib.mjs';

process.exit(run(bin('vitest'), ['run', 'parity', ...process.argv.slice(2)], { cwd: join(root, 'test'), allowFailure: true }));
