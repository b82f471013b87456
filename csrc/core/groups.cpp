#include "core/groups.h"

#include <numeric>
#include <unordered_map>

namespace prefkern {

GroupIndex group_index(const int64_t* ids, int64_t count) {
  GroupIndex index;
  int64_t groups = count > 0;
  bool ascending = true;
  for (int64_t i = 1; i < count; i++) {
    ascending &= ids[i - 1] <= ids[i];
    groups += ids[i - 1] != ids[i];
  }
  index.order.resize(count);
  if (ascending) {
    std::iota(index.order.begin(), index.order.end(), int64_t(0));
    index.offsets.resize(groups + 1);
    for (int64_t i = 0, k = 0; i < count; i++)
      if (i == 0 || ids[i] != ids[i - 1]) index.offsets[k++] = i;
    index.offsets[groups] = count;
    return index;
  }
  std::unordered_map<int64_t, int64_t> numbers;
  std::vector<int64_t> slot(count), sizes;
  for (int64_t i = 0; i < count; i++) {
    const auto [at, fresh] = numbers.try_emplace(ids[i], static_cast<int64_t>(sizes.size()));
    if (fresh) sizes.push_back(0);
    slot[i] = at->second;
    sizes[slot[i]]++;
  }
  index.offsets.assign(sizes.size() + 1, 0);
  for (int64_t k = 0; k < static_cast<int64_t>(sizes.size()); k++) index.offsets[k + 1] = index.offsets[k] + sizes[k];
  std::vector<int64_t> next(index.offsets.begin(), index.offsets.end() - 1);
  for (int64_t i = 0; i < count; i++) index.order[next[slot[i]]++] = i;
  return index;
}

}  // namespace prefkern
