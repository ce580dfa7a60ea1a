#include "../../abi-addon-a/native/addon.cc"
