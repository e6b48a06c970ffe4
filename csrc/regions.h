// The region of each pixel, on the host.
#pragma once

#include <algorithm>

#include "checks.h"
#include "hpcloss.h"

namespace hpcloss {

// The region of each pixel of a run.
class Regions {
 public:
  Regions(const hpcloss_regions& regions, int64_t num_regions)
      : given_(regions.ids ? regions : fewest_axes(regions)), num_regions_(num_regions) {}

  // Calls body(from, to, region) for runs of pixels [from, to) of one region inside [begin, end).
  template <class Body>
  void runs(int64_t begin, int64_t end, const Body& body) const {
    if (given_.ids) {
      return given_.ids_type == HPCLOSS_INT32 ? of_ids<int32_t>(begin, end, body) : of_ids<int64_t>(begin, end, body);
    }
    const int last = given_.axes - 1;
    const int64_t width = given_.extent[last], cell = given_.cell[last], cells = (width - 1) / cell + 1;
    for (int64_t pixel = begin; pixel < end;) {
      const int64_t line = pixel / width, first = line * width, line_end = std::min(first + width, end);
      const int64_t base = region_of_line(line) * cells;
      for (int64_t column = (pixel - first) / cell; pixel < line_end; ++column) {
        const int64_t to = std::min(first + (column + 1) * cell, line_end);
        body(pixel, to, base + column);
        pixel = to;
      }
    }
  }

 private:
  template <class Id, class Body>
  void of_ids(int64_t begin, int64_t end, const Body& body) const {
    const Id* ids = static_cast<const Id*>(given_.ids);
    for (int64_t pixel = begin; pixel < end;) {
      int64_t to = pixel + 1;
      while (to < end && ids[to] == ids[pixel]) ++to;
      const bool exists = ids[pixel] >= 0 && ids[pixel] < num_regions_;
      body(pixel, to, exists ? static_cast<int64_t>(ids[pixel]) : int64_t{-1});
      pixel = to;
    }
  }

  int64_t region_of_line(int64_t line) const {
    int64_t region = 0, stride = 1;
    for (int axis = given_.axes - 2; axis >= 0; --axis) {
      const int64_t extent = given_.extent[axis], cell = given_.cell[axis];
      region += line % extent / cell * stride;
      line /= extent;
      stride *= (extent - 1) / cell + 1;
    }
    return given_.per_image ? line * stride + region : region;
  }

  hpcloss_regions given_;
  int64_t num_regions_;
};

}  // namespace hpcloss
