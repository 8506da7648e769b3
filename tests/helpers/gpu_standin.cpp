// A stand-in for libcuda.so.1 and libamdhip64.so: it has no device, but writes down what it is asked to do.
//
// As a driver does, it takes the layout of a kernel's parameters from the code that it is given (the KPARAM records of a
// cubin, the argument list of a code object), and reads exactly those bytes at a launch. Handles are small numbers.

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

struct Parameter {
    unsigned offset, size;
};

struct Module {
    std::string image;
    std::map<unsigned, Parameter> parameters;
};

std::mutex lock;
std::string log_text, answer;
std::map<std::string, int> failures;
std::vector<Module> modules;
std::vector<void *> contexts;
thread_local int hip_device = 0;

int note(const char *name, const std::string &rest) {
    log_text += std::string("{\"call\": \"") + name + "\"" + rest + "}\n";
    const auto failure = failures.find(name);
    return failure == failures.end() ? 0 : failure->second;
}

std::string field(const char *name, uint64_t value) {
    return std::string(", \"") + name + "\": " + std::to_string(value);
}

std::string field(const char *name, const std::string &value) {
    return std::string(", \"") + name + "\": \"" + value + "\"";
}

void *handle(size_t number) { return reinterpret_cast<void *>(number); }

unsigned byte_at(const std::string &text, size_t place) { return static_cast<unsigned char>(text[place]); }

// The size of an ELF file of 64 bits: its section headers come last.
size_t elf_size(const char *image) {
    if (std::memcmp(image, "\177ELF", 4) != 0) return 0;
    uint64_t section_headers, program_headers;
    uint16_t sizes[4];
    std::memcpy(&program_headers, image + 32, 8);
    std::memcpy(&section_headers, image + 40, 8);
    std::memcpy(sizes, image + 54, 8);
    const uint64_t sections_end = section_headers + uint64_t(sizes[2]) * sizes[3];
    const uint64_t programs_end = program_headers + uint64_t(sizes[0]) * sizes[1];
    return sections_end > programs_end ? sections_end : programs_end;
}

void read_cubin(Module &module) {
    const std::string mark("\x04\x17\x0c\x00", 4);  // EIATTR_KPARAM_INFO, 12 bytes: index, ordinal, offset, size
    const std::string &image = module.image;
    for (size_t at = image.find(mark); at != std::string::npos; at = image.find(mark, at + 4)) {
        uint16_t ordinal, offset;
        uint32_t size;
        std::memcpy(&ordinal, &image[at + 8], 2);
        std::memcpy(&offset, &image[at + 10], 2);
        std::memcpy(&size, &image[at + 12], 4);
        module.parameters[ordinal] = {offset, size >> 18};
    }
}

unsigned message_pack_number(const std::string &text, size_t &place) {
    const unsigned first = byte_at(text, place++);
    if (first == 0xcc) return byte_at(text, place++);
    if (first == 0xcd) {
        place += 2;
        return byte_at(text, place - 2) << 8 | byte_at(text, place - 1);
    }
    return first;
}

void read_code_object(Module &module) {
    const std::string mark("\xa7.offset");  // each argument is a map of sorted names: .offset is followed by .size
    const std::string &image = module.image;
    unsigned ordinal = 0;
    for (size_t at = image.find(mark); at != std::string::npos; at = image.find(mark, at + 8)) {
        size_t place = at + mark.size();
        const unsigned offset = message_pack_number(image, place);
        place += 6;  // .size and the length before it
        const unsigned size = message_pack_number(image, place);
        if (image.compare(place, 12, "\xab.value_kind", 12) == 0 && image.compare(place + 13, 6, "hidden") != 0)
            module.parameters[ordinal++] = {offset, size};
    }
}

int load(const char *name, void **module, const void *image, void (*read)(Module &)) {
    const std::lock_guard<std::mutex> guard(lock);
    const size_t size = elf_size(static_cast<const char *>(image));
    if (int code = note(name, field("bytes", size))) return code;
    if (size == 0) return 200;
    modules.push_back({std::string(static_cast<const char *>(image), size), {}});
    read(modules.back());
    *module = handle(modules.size());
    return 0;
}

int find(const char *name, void **function, void *module, const char *symbol) {
    const std::lock_guard<std::mutex> guard(lock);
    if (int code = note(name, field("symbol", symbol))) return code;
    const std::string needle = std::string(symbol) + '\0';
    if (modules[reinterpret_cast<size_t>(module) - 1].image.find(needle) == std::string::npos) return 500;
    *function = module;
    return 0;
}

int launch(const char *name, void *function, const unsigned *sizes, void *stream, void **values, uint64_t place) {
    const std::lock_guard<std::mutex> guard(lock);
    std::string bytes = "[";
    for (const auto &[ordinal, parameter] : modules[reinterpret_cast<size_t>(function) - 1].parameters) {
        bytes += bytes.size() > 1 ? ", \"" : "\"";
        for (unsigned i = 0; i < parameter.size; ++i) {
            char hex[3];
            std::snprintf(hex, sizeof hex, "%02x", static_cast<unsigned char *>(values[ordinal])[i]);
            bytes += hex;
        }
        bytes += "\"";
    }
    std::string grid = "[", block = "[";
    for (int axis = 0; axis < 3; ++axis) {
        grid += std::to_string(sizes[axis]) + (axis < 2 ? ", " : "]");
        block += std::to_string(sizes[3 + axis]) + (axis < 2 ? ", " : "]");
    }
    return note(name, field("function", reinterpret_cast<uint64_t>(function)) + ", \"grid\": " + grid + ", \"block\": " +
                          block + field("shared", sizes[6]) + field("stream", reinterpret_cast<uint64_t>(stream)) +
                          field("place", place) + ", \"values\": " + bytes + "]");
}

int occupancy(const char *name, int *programs, void *function, int threads, size_t shared, uint64_t place) {
    const std::lock_guard<std::mutex> guard(lock);
    *programs = PROGRAMS_A_PROCESSOR;
    return note(name, field("function", reinterpret_cast<uint64_t>(function)) + field("threads", threads) +
                          field("shared", shared) + field("place", place));
}

const char *error_name(int code) {
    switch (code) {
        case 1: return "ERROR_INVALID_VALUE";
        case 101: return "ERROR_INVALID_DEVICE";
        case 200: return "ERROR_INVALID_IMAGE";
        case 500: return "ERROR_NOT_FOUND";
        default: return "ERROR_UNKNOWN";
    }
}

uint64_t current_context() { return contexts.empty() ? 0 : reinterpret_cast<uint64_t>(contexts.back()); }

}  // namespace

extern "C" {

// What the tests ask of the stand-in itself.

const char *standin_log() {
    const std::lock_guard<std::mutex> guard(lock);
    answer = log_text;
    log_text.clear();
    return answer.c_str();
}

void standin_fail(const char *name, int code) {
    if (code == 0)
        failures.erase(name);
    else
        failures[name] = code;
}

// CUDA. Contexts are numbered from 100 on, one a device.

int cuInit(unsigned) { return note("cuInit", ""); }

int cuDeviceGet(int *device, int number) {
    *device = number;
    return note("cuDeviceGet", field("device", number));
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = handle(100 + device);
    return note("cuDevicePrimaryCtxRetain", field("device", device));
}

int cuCtxPushCurrent_v2(void *context) {
    contexts.push_back(context);
    return 0;
}

int cuCtxPopCurrent_v2(void **context) {
    *context = contexts.back();
    contexts.pop_back();
    return 0;
}

int cuModuleLoadData(void **module, const void *image) { return load("cuModuleLoadData", module, image, read_cubin); }

int cuModuleGetFunction(void **function, void *module, const char *symbol) {
    return find("cuModuleGetFunction", function, module, symbol);
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    return note("cuFuncSetAttribute", field("function", reinterpret_cast<uint64_t>(function)) +
                                          field("attribute", attribute) + field("value", value));
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **values, void **) {
    const unsigned sizes[] = {gx, gy, gz, bx, by, bz, shared};
    return launch("cuLaunchKernel", function, sizes, stream, values, current_context());
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *programs, void *function, int threads, size_t shared) {
    const char *name = "cuOccupancyMaxActiveBlocksPerMultiprocessor";
    return occupancy(name, programs, function, threads, shared, current_context());
}

int cuGetErrorName(int code, const char **name) {
    *name = error_name(code);
    return 0;
}

// What cuda.core takes instead of modules: libraries, which are loaded for every device, and a table of entry points.

int cuLibraryLoadData(void **library, const void *image, void *, void *, unsigned, void *, void *, unsigned) {
    return load("cuLibraryLoadData", library, image, read_cubin);
}

int cuLibraryGetKernel(void **kernel, void *library, const char *symbol) {
    return find("cuLibraryGetKernel", kernel, library, symbol);
}

int cuLibraryUnload(void *) { return 0; }

int cuKernelSetAttribute(int attribute, int value, void *kernel, int device) {
    return note("cuKernelSetAttribute", field("function", reinterpret_cast<uint64_t>(kernel)) +
                                            field("attribute", attribute) + field("value", value) +
                                            field("device", device));
}

struct LaunchConfig {
    unsigned sizes[7];
    void *stream;
};

int cuLaunchKernelEx(const LaunchConfig *config, void *function, void **values, void **) {
    return launch("cuLaunchKernelEx", function, config->sizes, config->stream, values, current_context());
}

int cuCtxGetCurrent(void **context) {
    *context = contexts.empty() ? nullptr : contexts.back();
    return 0;
}

int cuDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}

int cuGetErrorString(int code, const char **text) { return cuGetErrorName(code, text); }

int cuGetProcAddress_v2(const char *name, void **function, int, uint64_t, int *found) {
    static void *const self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    *function = dlsym(self, (std::string(name) + "_v2").c_str());  // a name stands for its newest version
    if (*function == nullptr) *function = dlsym(self, name);
    if (found != nullptr) *found = *function == nullptr ? 1 : 0;
    return 0;
}

// HIP. The place of a launch is the thread's current device.

int hipGetDevice(int *device) {
    *device = hip_device;
    return 0;
}

int hipSetDevice(int device) {
    hip_device = device;
    return note("hipSetDevice", field("device", device));
}

int hipModuleLoadData(void **module, const void *image) {
    return load("hipModuleLoadData", module, image, read_code_object);
}

int hipModuleGetFunction(void **function, void *module, const char *symbol) {
    return find("hipModuleGetFunction", function, module, symbol);
}

int hipModuleLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, void *stream, void **values, void **) {
    const unsigned sizes[] = {gx, gy, gz, bx, by, bz, shared};
    return launch("hipModuleLaunchKernel", function, sizes, stream, values, hip_device);
}

int hipModuleOccupancyMaxActiveBlocksPerMultiprocessor(int *programs, void *function, int threads, size_t shared) {
    const char *name = "hipModuleOccupancyMaxActiveBlocksPerMultiprocessor";
    return occupancy(name, programs, function, threads, shared, hip_device);
}

const char *hipGetErrorName(int code) { return error_name(code); }
}
