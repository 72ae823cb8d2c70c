// Python's pickle format, protocol 2: as much of it as a dump needs. Writes a value at a time, depth first.
#pragma once

#include <cstdint>
#include <string>

namespace ringcomm {

class Pickle {
 public:
  Pickle() : bytes_("\x80\x02") {}

  // Ends the stream; exactly one value must have been written.
  std::string finish() && { return std::move(bytes_ += '.'); }

  // Calls fill(), which writes a key and a value in turn, or the elements.
  template <typename Fill>
  Pickle& dict(const Fill& fill) {
    bytes_ += "}(";
    fill();
    bytes_ += 'u';
    return *this;
  }
  template <typename Fill>
  Pickle& list(const Fill& fill) {
    bytes_ += "](";
    fill();
    bytes_ += 'e';
    return *this;
  }
  template <typename Fill>
  Pickle& tuple(const Fill& fill) {
    bytes_ += '(';
    fill();
    bytes_ += 't';
    return *this;
  }
  // UTF-8.
  Pickle& text(const std::string& value) {
    bytes_ += 'X';
    little_endian(value.size(), 4);
    bytes_ += value;
    return *this;
  }
  Pickle& integer(int64_t value) {
    bytes_ += "\x8a\x08";  // LONG1 of 8 bytes, two's complement
    little_endian(static_cast<uint64_t>(value), 8);
    return *this;
  }
  Pickle& boolean(bool value) {
    bytes_ += value ? '\x88' : '\x89';
    return *this;
  }
  Pickle& none() {
    bytes_ += 'N';
    return *this;
  }

 private:
  void little_endian(uint64_t value, int num_bytes) {
    for (int i = 0; i < num_bytes; ++i) bytes_ += static_cast<char>(value >> (8 * i) & 0xff);
  }

  std::string bytes_;
};

}  // namespace ringcomm
