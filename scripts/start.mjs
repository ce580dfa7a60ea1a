// `npm start`: set-up, then the quickstart.
import './setup.mjs';
import { run } from './lib.mjs';

run(process.execPath, ['examples/quickstart/quickstart.mjs', ...process.argv.slice(2)]);
