// Scratch memory for tasks on several threads.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace freshet::attention {

// Blocks of scratch memory, as many as tasks run at a time.
class ScratchPool {
 public:
  explicit ScratchPool(std::size_t floats) : floats_(floats) {}

  class Lease {
   public:
    explicit Lease(ScratchPool& pool) : pool_(pool), block_(pool.get()) {}
    ~Lease() { pool_.put(std::move(block_)); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    float* data() const { return block_.get(); }

   private:
    ScratchPool& pool_;
    struct Free {
      void operator()(float* block) const { ::operator delete(block, std::align_val_t{64}); }
    };
    friend class ScratchPool;
    std::unique_ptr<float, Free> block_;
  };

 private:
  using Block = std::unique_ptr<float, Lease::Free>;

  Block get() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        Block block = std::move(free_.back());
        free_.pop_back();
        return block;
      }
    }
    return Block(static_cast<float*>(::operator new(floats_ * sizeof(float), std::align_val_t{64})));
  }
  void put(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(block));
  }

  const std::size_t floats_;
  std::mutex mutex_;
  std::vector<Block> free_;
};

}  // namespace freshet::attention
