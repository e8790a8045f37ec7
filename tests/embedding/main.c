/* Calls rms_norm on arrays of its own and compares with plain loops; then calls it wrongly and reads the message. */
#include <math.h>
#include <megalodon.h>
#include <stdio.h>
#include <string.h>

enum { ROWS = 37, D = 75 };

static DLTensor make(float* data, int ndim, int64_t* shape) {
  DLTensor tensor;
  memset(&tensor, 0, sizeof tensor);
  tensor.data = data;
  tensor.device.device_type = kDLCPU;
  tensor.ndim = ndim;
  tensor.dtype.code = kDLFloat;
  tensor.dtype.bits = 32;
  tensor.dtype.lanes = 1;
  tensor.shape = shape;
  return tensor;
}

static int fail(const char* what) {
  fprintf(stderr, "embedding: %s (last error: %s)\n", what, megalodon_last_error());
  return 1;
}

int main(void) {
  static float x[ROWS * D], weight[D], y[ROWS * D], rstd[ROWS];
  int64_t x_shape[2] = {ROWS, D}, weight_shape[1] = {D}, rstd_shape[1] = {ROWS}, short_shape[1] = {D - 1};
  DLTensor tx = make(x, 2, x_shape), tweight = make(weight, 1, weight_shape);
  DLTensor ty = make(y, 2, x_shape), trstd = make(rstd, 1, rstd_shape), tshort = make(weight, 1, short_shape);
  const double eps = 1e-5;
  megalodon_spec specs[2];
  int r, d, status;

  for (r = 0; r < ROWS * D; ++r) x[r] = (float)((r * 7919) % 1009) / 500.0f - 1.0f;
  for (d = 0; d < D; ++d) weight[d] = (float)d / D - 0.5f;

  if (megalodon_rms_norm_forward_outputs(&tx, &tweight, eps, specs) != MEGALODON_OK) return fail("outputs");
  if (specs[0].ndim != 2 || specs[0].shape[1] != D || specs[1].ndim != 1 || specs[1].shape[0] != ROWS ||
      specs[1].dtype.bits != 32) {
    return fail("the specs of the outputs are wrong");
  }
  if (megalodon_rms_norm_forward(&tx, &tweight, eps, &ty, &trstd, NULL) != MEGALODON_OK) return fail("forward");
  for (r = 0; r < ROWS; ++r) {
    double squares = 0, scale;
    for (d = 0; d < D; ++d) squares += (double)x[r * D + d] * x[r * D + d];
    scale = 1 / sqrt(squares / D + eps);
    if (fabs(rstd[r] - scale) > 1e-6 * scale) return fail("rstd is wrong");
    for (d = 0; d < D; ++d) {
      if (fabs(y[r * D + d] - x[r * D + d] * scale * (weight[d] + 1.0)) > 1e-5) return fail("y is wrong");
    }
  }

  status = megalodon_rms_norm_forward(&tx, &tshort, eps, &ty, &trstd, NULL);
  if (status != MEGALODON_VALUE_ERROR) return fail("a short weight is no value error");
  if (strstr(megalodon_last_error(), "rms_norm: weight must be [D] with D = 75 (x.shape[1]); got [74]") == NULL) {
    return fail("the message is wrong");
  }
  if (megalodon_rms_norm_forward(NULL, NULL, eps, &ty, &trstd, NULL) == MEGALODON_OK) return fail("no x is no error");
  if (megalodon_rms_norm_forward(&tx, NULL, eps, NULL, &trstd, NULL) == MEGALODON_OK) return fail("no y is no error");
  if (megalodon_set_num_threads(0) != MEGALODON_VALUE_ERROR) return fail("no threads is no error");

  printf("megalodon_ops %s, %s: ok\n", megalodon_version(), megalodon_isa());
  return 0;
}
