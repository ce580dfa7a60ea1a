// Set-up of a fresh clone: dependencies, native addons, packages. A second run does nothing.
import { install, turbo } from './lib.mjs';

install();
turbo(['build']);
