// What main.cpp sees of device.cpp.
#pragma once

#include <string>

// host names of the kernels that were dispatched so far, separated by spaces
std::string & dispatched_kernels();
