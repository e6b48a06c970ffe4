// The label and the region of each pixel as kernels read them, and the intervals of rows.
#pragma once

#include <type_traits>

#include "checks.h"
#include "cuda.h"
#include "hpcloss.h"

namespace hpcloss {

// By value in every kernel.
struct Pixels {
  const void* labels;
  int32_t label_type;
  hpcloss_regions regions;           // of a grid with the fewest axes
  int64_t stride[HPCLOSS_MAX_AXES];  // of the cells along each axis
  int64_t cells;                     // of an image
  int64_t num_regions, ignore[HPCLOSS_MAX_IGNORED];
  int32_t num_ignore;

  __device__ bool is_ignored(int64_t label) const {
    bool ignored = false;
    for (int i = 0; i < num_ignore; ++i) ignored |= label == ignore[i];
    return ignored;
  }

  __device__ int64_t label_of(int64_t pixel) const {
    if (label_type == HPCLOSS_UINT8) return static_cast<const uint8_t*>(labels)[pixel];
    if (label_type == HPCLOSS_INT32) return static_cast<const int32_t*>(labels)[pixel];
    return static_cast<const int64_t*>(labels)[pixel];
  }

  // -1 for none. Pixels are divided in the width of Index: 64-bit division is many times slower.
  template <class Index>
  __device__ int64_t region_of(Index pixel) const {
    if (regions.ids) {
      const int64_t id = regions.ids_type == HPCLOSS_INT32 ? static_cast<const int32_t*>(regions.ids)[pixel]
                                                           : static_cast<const int64_t*>(regions.ids)[pixel];
      return id >= 0 && id < num_regions ? id : -1;
    }
    using Unsigned = std::make_unsigned_t<Index>;
    Unsigned rest = static_cast<Unsigned>(pixel);
    int64_t region = 0;
    for (int axis = regions.axes - 1; axis >= 0; --axis) {
      const Unsigned extent = static_cast<Unsigned>(regions.extent[axis]), lines = rest / extent;
      if (regions.cell[axis] != regions.extent[axis]) {
        region += (rest - lines * extent) / static_cast<Unsigned>(regions.cell[axis]) * stride[axis];
      }
      rest = lines;
    }
    return regions.per_image ? static_cast<int64_t>(rest) * cells + region : region;
  }
};

inline Pixels pixels(const void* labels, int32_t label_type, const hpcloss_regions& regions, int64_t num_regions,
                     const int64_t* ignore, int64_t num_ignore) {
  Pixels made{};
  made.labels = labels;
  made.label_type = label_type;
  made.regions = regions.ids ? regions : fewest_axes(regions);
  made.cells = 1;
  for (int axis = made.regions.axes - 1; axis >= 0 && !regions.ids; --axis) {
    made.stride[axis] = made.cells;
    made.cells *= (made.regions.extent[axis] - 1) / made.regions.cell[axis] + 1;
  }
  made.num_regions = num_regions;
  for (; made.num_ignore < num_ignore; ++made.num_ignore) made.ignore[made.num_ignore] = ignore[made.num_ignore];
  return made;
}

// The fields of `Pairs` (hpcloss/plan/partition.py) but for the order.
template <class Index>
struct Bounds {
  Index *pos_start, *pos_end, *self_pos, *anchor_start, *anchor_end, *key_start, *key_end;
};

}  // namespace hpcloss
