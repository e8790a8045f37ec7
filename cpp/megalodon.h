/* The C interface of megalodon_ops: one function per kernel, on DLPack tensors.
 *
 * Every function returns a megalodon_status; on anything but MEGALODON_OK, megalodon_last_error() holds the message
 * (thread-local, valid until the next failing call on the same thread) and no output has been written.
 *
 * Conventions, the same for every function:
 *   - inputs come first, then outputs (DLTensor*, written), then the stream (a cudaStream_t; ignored for CPU tensors);
 *   - optional tensors are NULL when absent; the gradient of an absent input is a tensor of shape [0];
 *   - tensors are compact and row-major (strides NULL or the compact strides) and live on one device;
 *   - activations are float32, bfloat16, float16 or float64; parameters, states and statistics ("stat") are float32, or
 *     float64 when the activation is float64; counts and positions are int64; masks are bool;
 *   - nothing is allocated: FUNCTION_outputs takes the same inputs, checks them and fills one megalodon_spec per
 * output, which is what the caller allocates. A last output named `workspace` is scratch memory of that many bytes.
 */
#ifndef MEGALODON_H_
#define MEGALODON_H_

#include <stdint.h>

#if defined(__has_include)
#if __has_include(<dlpack/dlpack.h>)
#include <dlpack/dlpack.h>
#endif
#endif

#ifndef DLPACK_DLL /* no <dlpack/dlpack.h>: declare the part of the DLPack ABI that is used here */
#define DLPACK_DLL
typedef enum { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3 } DLDeviceType;
typedef struct {
  int32_t device_type; /* a DLDeviceType */
  int32_t device_id;
} DLDevice;
typedef enum { kDLInt = 0U, kDLUInt = 1U, kDLFloat = 2U, kDLBfloat = 4U, kDLComplex = 5U, kDLBool = 6U } DLDataTypeCode;
typedef struct {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
} DLDataType;
typedef struct {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
} DLTensor;
#endif

#if defined(_WIN32)
#define MEGALODON_API __declspec(dllexport)
#else
#define MEGALODON_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define MEGALODON_MAX_NDIM 8

typedef enum {
  MEGALODON_OK = 0,
  MEGALODON_VALUE_ERROR = 1,     /* a wrong shape, size or number */
  MEGALODON_TYPE_ERROR = 2,      /* a wrong dtype or kind of argument */
  MEGALODON_NOT_IMPLEMENTED = 3, /* valid, and not built yet */
  MEGALODON_RUNTIME_ERROR = 4    /* the device or the system failed */
} megalodon_status;

typedef struct {
  DLDataType dtype;
  int32_t ndim;
  int64_t shape[MEGALODON_MAX_NDIM];
} megalodon_spec;

MEGALODON_API const char* megalodon_last_error(void);
MEGALODON_API const char* megalodon_version(void);
/* The CUDA version the GPU kernels were built with, or "" in a build without them. Touches no driver. */
MEGALODON_API const char* megalodon_cuda_version(void);

/* The instruction set the CPU kernels run: "portable", "avx2" or "avx512". Starts as the best the CPU has.
 * set_isa takes one of them or "auto"; not thread-safe against running kernels. */
MEGALODON_API const char* megalodon_isa(void);
MEGALODON_API int megalodon_set_isa(const char* name);

/* Threads. By default a pool of our own, of set_num_threads threads (initially one per core). set_parallel_for replaces
 * it with the caller's engine, so that two pools never compete: it calls task(begin, end, context) on disjoint ranges
 * that cover [begin, end), each of at least `grain` items (but for the last), and returns 0. NULL restores our own. */
typedef int32_t (*megalodon_parallel_for)(int64_t begin, int64_t end, int64_t grain,
                                          void (*task)(int64_t begin, int64_t end, void* context), void* context);
MEGALODON_API void megalodon_set_parallel_for(megalodon_parallel_for engine);
MEGALODON_API int megalodon_set_num_threads(int64_t count);
MEGALODON_API int64_t megalodon_num_threads(void); /* of our own pool */

/* cema: h_t = a x_t + q h_(t-1), y_t = Re sum_n g h_t + omega x_t. x, y, dy, dx (B, L, D); alpha, delta (D, N);
 * theta, omega (D); gamma (D, N, 2); h0, h, dh, dh0 (B, D, N, 2), last axis (re, im). h0, dh, cu_seqlens optional.
 * algorithm: "auto", "scan" or "fft". */
MEGALODON_API int megalodon_cema_forward_outputs(const DLTensor* x, const DLTensor* alpha, const DLTensor* delta,
                                                 const DLTensor* theta, const DLTensor* gamma, const DLTensor* omega,
                                                 const DLTensor* h0, const DLTensor* cu_seqlens, const char* algorithm,
                                                 megalodon_spec* outputs);
MEGALODON_API int megalodon_cema_forward(const DLTensor* x, const DLTensor* alpha, const DLTensor* delta,
                                         const DLTensor* theta, const DLTensor* gamma, const DLTensor* omega,
                                         const DLTensor* h0, const DLTensor* cu_seqlens, const char* algorithm,
                                         DLTensor* y, DLTensor* h, DLTensor* workspace, void* stream);
MEGALODON_API int megalodon_cema_backward_outputs(const DLTensor* dy, const DLTensor* dh, const DLTensor* x,
                                                  const DLTensor* alpha, const DLTensor* delta, const DLTensor* theta,
                                                  const DLTensor* gamma, const DLTensor* omega, const DLTensor* h0,
                                                  const DLTensor* cu_seqlens, const char* algorithm,
                                                  megalodon_spec* outputs);
MEGALODON_API int megalodon_cema_backward(const DLTensor* dy, const DLTensor* dh, const DLTensor* x,
                                          const DLTensor* alpha, const DLTensor* delta, const DLTensor* theta,
                                          const DLTensor* gamma, const DLTensor* omega, const DLTensor* h0,
                                          const DLTensor* cu_seqlens, const char* algorithm, DLTensor* dx,
                                          DLTensor* dalpha, DLTensor* ddelta, DLTensor* dtheta, DLTensor* dgamma,
                                          DLTensor* domega, DLTensor* dh0, DLTensor* workspace, void* stream);

/* rms_norm: y = x / sqrt(mean(x^2) + eps) * (weight + 1). x, y (..., D); weight (D); rstd (...). */
MEGALODON_API int megalodon_rms_norm_forward_outputs(const DLTensor* x, const DLTensor* weight, double eps,
                                                     megalodon_spec* outputs);
MEGALODON_API int megalodon_rms_norm_forward(const DLTensor* x, const DLTensor* weight, double eps, DLTensor* y,
                                             DLTensor* rstd, void* stream);
MEGALODON_API int megalodon_rms_norm_backward_outputs(const DLTensor* dy, const DLTensor* x, const DLTensor* weight,
                                                      const DLTensor* rstd, megalodon_spec* outputs);
MEGALODON_API int megalodon_rms_norm_backward(const DLTensor* dy, const DLTensor* x, const DLTensor* weight,
                                              const DLTensor* rstd, DLTensor* dx, DLTensor* dweight,
                                              DLTensor* workspace, void* stream);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* MEGALODON_H_ */
