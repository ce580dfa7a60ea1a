// turbo.mjs <task...>: what `npm run build` and `npm run build:native` do.
import { turbo } from './lib.mjs';

turbo(process.argv.slice(2));
